// The data of the page and what the reader has chosen to see.

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

function bytes(base64) {
  const text = atob(base64);
  const out = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) out[i] = text.charCodeAt(i);
  return out.buffer; // numbers are little-endian, as on every machine with a browser
}

for (const run of data.runs) {
  run.grids = run.grids.map((grid) => new Float64Array(bytes(grid)));
  for (const series of Object.values(run.series)) {
    series.x = run.grids[series.x];
    series.v = new Float32Array(bytes(series.v));
    if (series.m !== undefined) {
      series.mx = run.grids[series.mx];
      series.m = new Float32Array(bytes(series.m));
    }
  }
  if (run.cosines) {
    run.cosines.from = new Float64Array(bytes(run.cosines.from));
    run.cosines.to = new Float64Array(bytes(run.cosines.to));
    run.cosines.v = new Int16Array(bytes(run.cosines.v));
  }
}

function wholeRange() {
  let low = Infinity, high = -Infinity;
  for (const run of data.runs)
    for (const grid of run.grids)
      if (grid.length) { low = Math.min(low, grid[0]); high = Math.max(high, grid[grid.length - 1]); }
  if (low > high) return [0, 1];
  return low === high ? [low - 1, high + 1] : [low, high];
}

const whole = wholeRange();
const state = {
  tasks: data.tasks.map(() => true),
  runs: data.runs.map(() => true),
  halfLife: 0, // of the smoothing, in steps
  range: whole,
  colourBy: "task",
  focus: null, // index of the task that is pointed at
};

// Okabe and Ito first, yellow darkened on white; then hues a golden angle apart
const LIGHT = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b98300", "#7a6a00", "#555b63"];
const DARK = ["#4ba3dd", "#f07b2e", "#2cc497", "#e39ac4", "#8fd0f7", "#e6a726", "#f0e442", "#aab2bd"];
const DASHES = [[], [7, 4], [2, 3], [9, 3, 2, 3], [14, 4], [4, 2, 4, 6]];

const isDark = () => document.documentElement.dataset.theme === "dark";

function hue(index) {
  const palette = isDark() ? DARK : LIGHT;
  if (index < palette.length) return palette[index];
  const angle = Math.round(((index - palette.length) * 137.508 + 20) % 360);
  const light = (isDark() ? 60 : 36) + 9 * (index % 3);
  return `hsl(${angle} ${55 + 15 * (index % 2)}% ${light}%)`;
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dashOf = (index) => DASHES[index % DASHES.length];

// how a line looks: by task, with the run in its dashes; or by run, with the task in its dashes
function look(task, run) {
  if (state.colourBy === "run") return { colour: hue(run), dash: task < 0 || data.tasks.length > 6 ? [] : dashOf(task) };
  return { colour: task < 0 ? css("--ink") : hue(task), dash: dashOf(run) };
}

const atStep = (step) => String(Math.round(step));

function format(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("e+", "e");
  return String(Number(value.toPrecision(4)));
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value);
  }
  made.append(...children); // strings become text, never markup
  return made;
}

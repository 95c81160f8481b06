// Cosines between tasks at one step, one matrix per run.

const MISSING = -32768;
const frames = []; // the steps at which some run's matrix changes
let largest = 1; // cosine at the ends of the colours

function setupHeatmaps() {
  const steps = new Set();
  for (const run of data.runs) for (const step of run.cosines?.to ?? []) steps.add(step);
  frames.push(...[...steps].sort((a, b) => a - b));
  if (!frames.length) return;
  $("cosines").hidden = false;
  $("frame").max = frames.length - 1;
  $("frame").value = frames.length - 1;
  $("frame").addEventListener("input", () => drawHeatmaps());
  let found = 0;
  for (const run of data.runs) for (const value of run.cosines?.v ?? []) if (value !== MISSING) found = Math.max(found, Math.abs(value));
  largest = [0.05, 0.1, 0.2, 0.5, 1].find((end) => 1e4 * end >= found) ?? 1; // cosines at wide features are small
  [$("scale").firstElementChild.textContent, $("scale").lastElementChild.textContent] = [`−${largest}`, `${largest}`];
  data.runs.forEach((run) => {
    if (!run.cosines) return;
    run.matrix = new Map(run.cosines.pairs.flatMap(([i, j], p) => [[`${i},${j}`, p], [`${j},${i}`, p]]));
    run.canvas = element("canvas", { role: "img" });
    run.said = element("div", { class: "readout", "aria-live": "polite" });
    run.figure = element("figure", { class: "matrix" }, element("figcaption", {}, element("b", {}, run.name)), run.canvas, run.said, ...timeline(run));
    run.canvas.addEventListener("mousemove", (event) => pointAt(run, event));
    run.canvas.addEventListener("mouseleave", () => describeFrame(run));
    $("matrices").append(run.figure);
  });
}

// goes to the frame that holds a step
function showStep(step) {
  const found = frames.findIndex((end) => end >= step);
  $("frame").value = found < 0 ? frames.length - 1 : found;
  drawHeatmaps();
}

const signed = (value, digits) => value.toFixed(digits).replace("-", "−");

function diverging(cosine) {
  if (cosine === null) return css("--soft");
  const ends = isDark() ? [[240, 130, 50], [80, 170, 235]] : [[205, 85, 0], [0, 105, 175]];
  const middle = isDark() ? [40, 45, 52] : [246, 247, 248];
  const end = ends[cosine < 0 ? 0 : 1], share = Math.pow(Math.min(1, Math.abs(cosine) / largest), 0.8);
  return `rgb(${middle.map((from, k) => Math.round(from + share * (end[k] - from))).join(" ")})`;
}

function cosine(run, i, j) {
  const pair = run.matrix.get(`${i},${j}`);
  return pair === undefined ? null : cosineAt(run, run.frame, pair);
}

function cosineAt(run, frame, pair) {
  const value = run.cosines.v[frame * run.cosines.pairs.length + pair];
  return value === MISSING ? null : value / 1e4;
}

function tasksIn(run) {
  const used = new Set(run.cosines.pairs.flat());
  return [...used].sort((a, b) => a - b).filter((task) => state.tasks[task]);
}

function drawHeatmaps() {
  if (!frames.length) return;
  const step = frames[Number($("frame").value)];
  $("frame-value").textContent = atStep(step);
  $("frame").setAttribute("aria-valuetext", `step ${step}`);
  const visible = data.runs.filter((run, r) => run.cosines && state.runs[r]);
  data.runs.forEach((run, r) => { if (run.figure) run.figure.hidden = !state.runs[r]; });
  for (const run of visible) {
    const ends = run.cosines.to;
    const found = ends.findIndex((end) => end >= step);
    run.frame = found < 0 ? ends.length - 1 : found; // a shorter run stays at its end
    drawMatrix(run);
    describeFrame(run);
    drawTimeline(run);
  }
  drawScale();
}

function drawMatrix(run) {
  const tasks = (run.shown = tasksIn(run)), n = tasks.length;
  const room = Math.min($("matrices").clientWidth, 600), ratio = devicePixelRatio;
  const names = (room - 110) / n >= 7 ? Math.min(110, 12 + 6.3 * Math.max(...tasks.map((task) => clipped(data.tasks[task]).length), 1)) : 0;
  const cell = (run.cell = Math.max(3, Math.min(56, Math.floor((room - names - 4) / Math.max(1, n)))));
  run.offset = names;
  const header = cell >= 30 ? 18 : 0; // names of columns only where they fit upright
  run.top = header;
  const [width, height] = [names + n * cell, header + n * cell];
  Object.assign(run.canvas, { width: width * ratio, height: height * ratio });
  run.canvas.style.width = `${width}px`;
  const context = run.canvas.getContext("2d");
  context.scale(ratio, ratio);
  const size = Math.min(11, Math.max(6, cell - 1));
  context.font = `${size}px system-ui, sans-serif`;
  context.textBaseline = "middle";
  tasks.forEach((a, i) => {
    context.fillStyle = css("--dim");
    context.textAlign = "right";
    if (names) context.fillText(clipped(data.tasks[a]), names - 5, header + (i + 0.5) * cell);
    context.textAlign = "center";
    if (header) context.fillText(data.tasks[a].slice(0, Math.max(2, Math.floor(cell / 6.6))), names + (i + 0.5) * cell, 8);
    tasks.forEach((b, j) => drawCell(context, run, i, j, a === b ? 1 : cosine(run, a, b)));
  });
  const spans = run.cosines, from = spans.from[run.frame], to = spans.to[run.frame];
  run.span = from === to ? `step ${atStep(to)}` : `mean of steps ${atStep(from)} to ${atStep(to)}`;
  run.figure.dataset.span = run.span;
  run.canvas.setAttribute("aria-label", `Cosines of ${n} tasks, run ${run.name}, ${run.span}`);
}

function drawCell(context, run, i, j, value) {
  const { cell, offset, top } = run, gap = cell > 8 ? 1 : 0;
  context.fillStyle = i === j ? css("--line") : diverging(value);
  context.fillRect(offset + j * cell, top + i * cell, cell - gap, cell - gap);
  if (cell < 34 || i === j) return;
  context.fillStyle = value !== null && Math.abs(value) > 0.6 * largest ? (isDark() ? "#000" : "#fff") : css("--ink");
  context.fillText(value === null ? "–" : signed(value, 2), offset + (j + 0.5) * cell, top + (i + 0.5) * cell);
}

function describeFrame(run) {
  let lowest = null, opposed = 0, known = 0;
  run.shown.forEach((a, i) => run.shown.slice(i + 1).forEach((b) => {
    const value = cosine(run, a, b);
    if (value === null) return;
    known++;
    if (value < 0) opposed++;
    if (lowest === null || value < lowest.value) lowest = { value, a, b };
  }));
  const text = lowest === null ? "no pair has a value" :
    `${opposed} of ${known} pairs oppose; lowest: ${data.tasks[lowest.a]} and ${data.tasks[lowest.b]}, ${signed(lowest.value, 3)}`;
  run.said.textContent = `${run.span}: ${text}`;
}

function pointAt(run, event) {
  const box = run.canvas.getBoundingClientRect();
  const shrink = run.canvas.width / devicePixelRatio / box.width;
  const j = Math.floor(((event.clientX - box.left) * shrink - run.offset) / run.cell);
  const i = Math.floor(((event.clientY - box.top) * shrink - run.top) / run.cell);
  const [a, b] = [run.shown[i], run.shown[j]];
  if (a === undefined || b === undefined || a === b) return describeFrame(run);
  const value = cosine(run, a, b);
  run.said.textContent = `${run.span}: ${data.tasks[a]} and ${data.tasks[b]}, ${value === null ? "no value" : signed(value, 3)}`;
}

function drawScale() {
  const canvas = $("scale").querySelector("canvas"), context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    context.fillStyle = diverging(largest * ((2 * x) / (canvas.width - 1) - 1));
    context.fillRect(x, 0, 1, canvas.height);
  }
}

// One figure per panel: a uPlot chart, its log switch, and the values at the cursor.

const MAX_ITEMS = 8; // names in a readout, and at the ends of lines
const WHOLE_STEPS = Array.from({ length: 40 }, (_, i) => [1, 2, 5][i % 3] * 10 ** Math.floor(i / 3));
const figures = [];

function makeFigure(panel) {
  const { possible, better } = logarithm(panel);
  const figure = { panel, log: better, lines: [], chart: null, step: null, near: -1 };
  const toggle = element("button", { type: "button", class: "log", "aria-pressed": String(better), onclick: () => {
    figure.log = !figure.log;
    toggle.setAttribute("aria-pressed", String(figure.log));
    drawFigure(figure);
  } }, "log");
  toggle.setAttribute("aria-label", `Logarithmic axis for ${panel.title}`);
  toggle.disabled = !possible;
  const caption = element("figcaption", {}, element("b", {}, panel.title), toggle, element("small", {}, panel.caption));
  figure.plot = element("div", { class: "plot" });
  figure.readout = element("div", { class: "readout" });
  figure.node = element("figure", {}, caption, figure.plot, figure.readout);
  figures.push(figure);
  return figure.node;
}

function drawFigure(figure) {
  figure.chart?.destroy();
  figure.chart = null;
  const { panel, log } = figure;
  const lines = (figure.lines = linesOf(panel));
  const drawn = figure.lines.length <= 12 ? lines.flatMap((line) => (line.raw ? [line.raw] : [])) : [];
  const all = (figure.all = [...drawn, ...lines]); // raw lines lie under the smoothed ones
  const columns = [];
  const xs = union(all.map((line) => line.x));
  for (const line of all) columns.push(column(xs, line, log));
  Object.assign(figure.node.dataset, { series: lines.length, log: String(log), smoothed: String(state.halfLife > 0) });
  figure.plot.classList.toggle("empty", !lines.length);
  figure.plot.setAttribute("role", "img");
  figure.plot.setAttribute("aria-label", `${panel.title}: ${lines.length} lines over steps ${state.range.map(atStep).join(" to ")}`);
  figure.plot.replaceChildren();
  if (lines.length) figure.chart = new uPlot(options(figure, drawn.length), [xs, ...columns], figure.plot);
  else figure.plot.append("nothing chosen has values here");
  readout(figure);
}

function options(figure, numRaw) {
  const { log, panel, all, lines } = figure;
  const width = figure.plot.clientWidth || 400, height = figure.plot.clientHeight || 210;
  const name = endNames(lines), ends = width >= 340 && name !== null;
  const axis = { stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { show: false },
    font: "11px system-ui, sans-serif" };
  return {
    width, height,
    padding: [8, ends ? labelWidth(lines.map(name)) : 16, 0, 0],
    legend: { show: false },
    cursor: {
      sync: { key: "steps", setSeries: false, filters: { pub: (type) => type === "mousemove" || type === "mouseleave" } },
      focus: { prox: 20 },
      drag: { x: true, y: false, setScale: false },
      points: { size: 6 },
      bind: { dblclick: () => () => setRange(whole) },
    },
    focus: { alpha: lines.length > 1 ? (lines.length > 12 ? 0.12 : 0.3) : 1 },
    scales: {
      x: { time: false, range: () => state.range },
      y: { range: (chart, low, high) => padded(low, high, panel.zero && !log) },
    },
    axes: [
      { ...axis, size: 26, gap: 3, incrs: WHOLE_STEPS, values: (chart, ticks) => ticks.map(shortNumber) },
      { ...axis, size: (chart, texts) => 12 + 6.4 * Math.max(2, ...(texts ?? []).map((text) => text.length)), gap: 4,
        splits: log ? (chart, i, low, high) => logTicks(low, high) : undefined,
        values: (chart, ticks) => ticks.map((tick) => shortNumber(log ? Math.pow(10, tick) : tick)) },
    ],
    series: [{}, ...all.map((line, i) => {
      const { colour, dash } = look(line.task, line.run);
      const raw = i < numRaw;
      return {
        label: line.label, stroke: colour, dash, spanGaps: true, width: raw ? 1 : all.length > 24 ? 1.1 : 1.6,
        alpha: raw ? 0.25 : fade(line), points: { show: line.sparse && !raw, size: 5 },
      };
    })],
    hooks: {
      setCursor: [(chart) => { figure.step = chart.cursor.idx === null ? null : chart.data[0][chart.cursor.idx]; readout(figure); }],
      setSeries: [(chart, index) => { figure.near = index === null ? -1 : index - 1; }],
      setSelect: [(chart) => {
        const { left, width: span } = chart.select;
        if (span < 4) return;
        const range = [chart.posToVal(left, "x"), chart.posToVal(left + span, "x")];
        chart.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
        setRange(range);
      }],
      ready: [(chart) => chart.over.addEventListener("click", () => figure.step !== null && showStep(figure.step))],
      draw: ends ? [(chart) => drawEnds(chart, figure, name)] : [],
    },
  };
}

const fade = (line) => (state.focus === null || line.task < 0 || line.task === state.focus ? 1 : 0.12);
const clipped = (text) => (text.length > 14 ? text.slice(0, 13) + "…" : text);
const labelWidth = (names) => 16 + 6.2 * Math.max(...names.map((name) => clipped(name).length));

// what to write beside the ends of lines: tasks of one run, or runs of one task; null where that is not enough
function endNames(lines) {
  if (lines.length < 2 || lines.length > MAX_ITEMS) return null;
  if (lines.every((line) => line.run === lines[0].run)) return (line) => line.label;
  if (lines.every((line) => line.task === lines[0].task)) return (line) => data.runs[line.run].name;
  return null;
}

function padded(low, high, zero) {
  if (low === null || low === undefined || !Number.isFinite(low)) return [0, 1];
  if (zero) { low = Math.min(low, 0); high = Math.max(high, 0); }
  const room = 0.05 * (high - low) || 0.1 * Math.abs(high) || 0.5;
  return [zero && low === 0 ? 0 : low - room, high + room];
}

function shortNumber(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(1).replace(".0e", "e");
  return String(Number(value.toPrecision(4)));
}

// names beside the last points, pushed apart where they would overlap
function drawEnds(chart, figure, name) {
  const { ctx } = chart, ratio = devicePixelRatio, gap = 12 * ratio, labels = [];
  for (const line of figure.lines) {
    const value = valueAt(line, state.range[1]);
    if (value === null || (figure.log && value <= 0)) continue;
    const y = chart.valToPos(figure.log ? Math.log10(value) : value, "y", true);
    labels.push({ text: name(line), y, colour: look(line.task, line.run).colour });
  }
  labels.sort((a, b) => a.y - b.y);
  const top = chart.bbox.top + gap / 2, bottom = chart.bbox.top + chart.bbox.height;
  labels.forEach((label, i) => { label.y = Math.max(label.y, i ? labels[i - 1].y + gap : top); });
  for (let i = labels.length - 1, limit = bottom; i >= 0; i--, limit -= gap) labels[i].y = Math.min(labels[i].y, limit);
  ctx.save();
  ctx.font = `${11 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "middle";
  for (const label of labels) {
    ctx.fillStyle = label.colour;
    ctx.fillText(clipped(label.text), chart.bbox.left + chart.bbox.width + 6 * ratio, label.y);
  }
  ctx.restore();
}

// From stored series to the aligned columns that a chart draws.

// exponential mean whose memory halves every halfLife steps; unbiased from the first step on
function smooth(xs, ys, halfLife) {
  const out = new Array(ys.length);
  let sum = 0, weight = 0, before = null;
  for (let i = 0; i < ys.length; i++) {
    const value = ys[i];
    if (value === null || Number.isNaN(value)) { out[i] = null; continue; }
    const keep = before === null ? 0 : Math.pow(0.5, (xs[i] - before) / halfLife);
    sum = keep * sum + value;
    weight = keep * weight + 1;
    out[i] = sum / weight;
    before = xs[i];
  }
  return out;
}

// visible lines of a panel: {task, run, label, x, y} and the faint raw line under a smoothed one
function linesOf(panel) {
  const lines = [];
  data.runs.forEach((run, r) => {
    if (!state.runs[r]) return;
    for (const { key, task } of panel.lines) {
      const series = run.series[key];
      if (!series || (task >= 0 && !state.tasks[task])) continue;
      const label = task >= 0 ? data.tasks[task] : run.name;
      const raw = { task, run: r, label, x: series.x, y: series.v, sparse: series.x.length < 40 };
      if (!state.halfLife) { lines.push(raw); continue; }
      const [x, y] = series.m ? [series.mx, series.m] : [series.x, series.v];
      lines.push({ ...raw, x, y: smooth(x, y, state.halfLife), raw });
    }
  });
  return lines;
}

function union(grids) {
  const distinct = [...new Set(grids)];
  if (distinct.length === 1) return Array.from(distinct[0]);
  const all = new Float64Array(distinct.reduce((sum, grid) => sum + grid.length, 0));
  let at = 0;
  for (const grid of distinct) { all.set(grid, at); at += grid.length; }
  all.sort();
  return Array.from(all).filter((step, i) => i === 0 || step !== all[i - 1]);
}

// values at the steps xs, null where there are none; logarithms are taken here, so that axes stay linear
function column(xs, line, log) {
  const out = new Array(xs.length).fill(null);
  let i = 0;
  for (let k = 0; k < line.x.length; k++) {
    while (xs[i] < line.x[k]) i++;
    const value = line.y[k];
    if (value === null || Number.isNaN(value) || (log && value <= 0)) continue;
    out[i] = log ? Math.log10(value) : value;
  }
  return out;
}

// the value of a line at a step, or its last one before
function valueAt(line, step) {
  let low = 0, high = line.x.length - 1;
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (line.x[middle] <= step) low = middle; else high = middle - 1;
  }
  for (let i = low; i >= 0; i--)
    if (line.x[i] <= step && line.y[i] !== null && !Number.isNaN(line.y[i])) return line.y[i];
  return null;
}

// whether a logarithmic axis is possible, and whether it is the better start
function logarithm(panel) {
  let low = Infinity, high = -Infinity, positive = 0;
  for (const run of data.runs)
    for (const { key } of panel.lines)
      for (const value of run.series[key]?.v ?? []) {
        if (Number.isNaN(value)) continue;
        low = Math.min(low, value);
        high = Math.max(high, value);
        if (value > 0) positive++;
      }
  return { possible: positive > 0, better: !panel.zero && low > 0 && high > 30 * low };
}

function logTicks(low, high) {
  const decades = high - low;
  if (decades > 6) {
    const every = Math.ceil(decades / 6), ticks = [];
    for (let k = Math.ceil(low / every) * every; k <= high; k += every) ticks.push(k);
    return ticks;
  }
  const steps = decades > 2.5 ? [1] : decades > 1.2 ? [1, 3] : decades > 0.5 ? [1, 2, 5] : [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9];
  const ticks = [];
  for (let k = Math.floor(low); k <= high; k++)
    for (const step of steps) {
      const tick = k + Math.log10(step);
      if (tick >= low && tick <= high) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : [low, (low + high) / 2, high];
}

// Cosines over the whole run: a strip for each of the pairs that oppose each other most.

const MAX_STRIPS = 12, STRIP = 13; // rows, and their height

function timeline(run) {
  run.strips = element("canvas", { class: "timeline", role: "img" });
  run.strips.addEventListener("click", (event) => {
    const box = run.strips.getBoundingClientRect(), names = run.stripNames;
    const share = (event.clientX - box.left - names) / (box.width - names);
    showStep(whole[0] + Math.max(0, share) * (whole[1] - whole[0]));
  });
  run.stripsSaid = element("p");
  return [run.stripsSaid, run.strips];
}

// mean over the frames of every pair of tasks shown, lowest first
function lowestPairs(run) {
  const shown = new Set(run.shown), means = [], frames = run.cosines.to.length;
  run.cosines.pairs.forEach(([a, b], pair) => {
    if (!shown.has(a) || !shown.has(b)) return;
    let sum = 0, count = 0;
    for (let frame = 0; frame < frames; frame++) {
      const value = cosineAt(run, frame, pair);
      if (value !== null) { sum += value; count++; }
    }
    if (count) means.push({ pair, a, b, mean: sum / count });
  });
  return means.sort((x, y) => x.mean - y.mean);
}

function drawTimeline(run) {
  const all = lowestPairs(run), pairs = all.slice(0, MAX_STRIPS);
  const width = Math.min($("matrices").clientWidth, data.runs.length > 1 ? 380 : 640), height = pairs.length * STRIP;
  const ratio = devicePixelRatio, { from, to } = run.cosines;
  Object.assign(run.strips, { width: width * ratio, height: Math.max(1, height) * ratio });
  run.strips.style.width = `${width}px`;
  const context = run.strips.getContext("2d");
  context.scale(ratio, ratio);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  const title = ({ a, b }) => `${clipped(data.tasks[a])} · ${clipped(data.tasks[b])}`;
  const names = (run.stripNames = 8 + Math.max(0, ...pairs.map((pair) => context.measureText(title(pair)).width)));
  const x = (step) => names + ((step - whole[0]) / (whole[1] - whole[0])) * (width - names);
  pairs.forEach((each, row) => {
    context.fillStyle = css("--dim");
    context.fillText(title(each), 0, (row + 0.5) * STRIP);
    for (let frame = 0; frame < to.length; frame++) {
      const left = frame ? x(to[frame - 1]) : x(from[0]);
      context.fillStyle = diverging(cosineAt(run, frame, each.pair));
      context.fillRect(left, row * STRIP, Math.max(1, x(to[frame]) - left + 0.5), STRIP - 1);
    }
  });
  context.fillStyle = css("--ink");
  context.fillRect(Math.min(width - 2, x(to[run.frame]) - 1), 0, 2, height);
  const which = all.length > pairs.length ? `The ${pairs.length} lowest of ${all.length} pairs` : "All pairs";
  run.stripsSaid.textContent = pairs.length ? `${which} over the run, lowest mean first.` : "";
  run.strips.setAttribute("aria-label", pairs.length ? `Cosines over steps, lowest: ${data.tasks[pairs[0].a]} and ${data.tasks[pairs[0].b]}, mean ${signed(pairs[0].mean, 3)}` : "");
}

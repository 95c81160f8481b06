// Puts the page together and draws it again after every choice.

let waiting = false;

function refresh() {
  drawChips();
  figures.forEach(drawFigure);
  drawHeatmaps();
}

function refreshSoon() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; refresh(); });
}

function setupCharts() {
  const sections = new Map();
  for (const panel of data.panels) {
    if (!sections.has(panel.section)) {
      const grid = element("div", { class: "grid" });
      sections.set(panel.section, grid);
      $("charts").append(element("section", { "aria-label": panel.section }, element("h2", {}, panel.section), grid));
    }
    sections.get(panel.section).append(makeFigure(panel));
  }
  if (!data.panels.length) $("charts").append(element("p", { class: "empty" }, "There is nothing to draw yet."));
}

setupControls();
setupTables();
setupCharts();
setupHeatmaps();
setRange(whole);
if (!figures.length) refresh();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; refreshSoon(); } });

// Chips that switch tasks and runs, smoothing, range, colours, theme, sorting.

function chip(kind, index, label) {
  const swatch = element("canvas", { width: 22, height: 10, "aria-hidden": "true" });
  const made = element("button", { type: "button", class: "chip", "aria-pressed": "true", title: label,
    onclick: () => { state[kind][index] = !state[kind][index]; refresh(); },
    ondblclick: () => { state[kind] = state[kind].map((_, i) => i === index); refresh(); },
  }, swatch, element("span", {}, label));
  made.dataset[kind] = index;
  if (kind === "tasks") {
    const point = (task) => () => { state.focus = task; refreshSoon(); };
    made.addEventListener("mouseenter", point(index));
    made.addEventListener("mouseleave", point(null));
  }
  return made;
}

function drawChips() {
  for (const made of document.querySelectorAll(".chip")) {
    const kind = "tasks" in made.dataset ? "tasks" : "runs";
    const index = Number(made.dataset[kind]);
    made.setAttribute("aria-pressed", String(state[kind][index]));
    const { colour, dash } = kind === "tasks" ? look(index, 0) : look(-1, index);
    const plain = kind === "tasks" && state.colourBy === "run";
    swatch(made.querySelector("canvas"), plain ? css("--dim") : colour, plain || kind === "runs" ? dash : []);
  }
}

function swatch(canvas, colour, dash) {
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.strokeStyle = colour;
  context.lineWidth = 3;
  context.setLineDash(dash);
  context.beginPath();
  context.moveTo(0, 5);
  context.lineTo(22, 5);
  context.stroke();
}

function setupControls() {
  data.tasks.forEach((task, i) => $("tasks").append(chip("tasks", i, task)));
  if (data.runs.length > 1) data.runs.forEach((run, i) => $("runs").append(chip("runs", i, run.name)));
  $("colour-by").hidden = data.runs.length < 2;
  $("search").hidden = data.tasks.length < 12;
  $("search").addEventListener("input", () => {
    const wanted = $("search").value.toLowerCase();
    for (const made of $("tasks").children) made.hidden = !made.title.toLowerCase().includes(wanted);
  });
  const setAll = (shown) => () => {
    for (const made of $("tasks").children) if (!made.hidden) state.tasks[made.dataset.tasks] = shown;
    refresh();
  };
  $("all").addEventListener("click", setAll(true));
  $("none").addEventListener("click", setAll(false));
  $("smoothing").addEventListener("input", () => {
    const share = Number($("smoothing").value) / 100; // half-lives from one step to a quarter of the run
    const longest = Math.max(2, (whole[1] - whole[0]) / 4);
    state.halfLife = share ? Math.pow(longest, share) : 0;
    $("smoothing-value").textContent = share ? `half-life ${format(Number(state.halfLife.toPrecision(2)))} steps` : "off";
    refreshSoon();
  });
  for (const id of ["from", "to"])
    $(id).addEventListener("change", () => {
      const range = [Number($("from").value), Number($("to").value)];
      setRange(range[0] < range[1] ? range : state.range);
    });
  $("reset").addEventListener("click", () => setRange(whole));
  $("colour").addEventListener("change", () => { state.colourBy = $("colour").value; refresh(); });
  setupTheme();
}

function setRange(range) {
  state.range = [Math.max(whole[0], range[0]), Math.min(whole[1], range[1])];
  if (!(state.range[0] < state.range[1])) state.range = whole;
  [$("from").value, $("to").value] = state.range.map((step) => String(Math.round(step)));
  if (figures.length) refresh();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light" : "Dark";
}

function setupTheme() {
  const preference = matchMedia("(prefers-color-scheme: dark)");
  const follow = () => setTheme(preference.matches ? "dark" : "light");
  follow();
  preference.addEventListener("change", () => { follow(); refresh(); });
  $("theme").addEventListener("click", () => { setTheme(isDark() ? "light" : "dark"); refresh(); });
  let before = null;
  addEventListener("beforeprint", () => { before = document.documentElement.dataset.theme; setTheme("light"); refresh(); });
  addEventListener("afterprint", () => { setTheme(before ?? "light"); refresh(); });
}

function setupTables() {
  for (const table of document.querySelectorAll("table.sortable"))
    table.querySelectorAll("th").forEach((head, i) => head.firstChild.addEventListener("click", () => sortBy(table, head, i)));
  const differs = document.querySelector("tr.differs");
  document.querySelector(".differences").hidden = !differs;
  $("only-differences").addEventListener("change", () => $("settings").classList.toggle("only", $("only-differences").checked));
}

function sortBy(table, head, index) {
  const before = head.getAttribute("aria-sort");
  const first = head.classList.contains("n") ? "descending" : "ascending";
  const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
  for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const body = table.tBodies[0];
  const compare = (a, b) => {
    const [x, y] = [a.cells[index], b.cells[index]];
    if (!head.classList.contains("n")) return sign * x.textContent.localeCompare(y.textContent, undefined, { numeric: true });
    if (x.dataset.v === undefined || y.dataset.v === undefined) return (x.dataset.v === undefined) - (y.dataset.v === undefined);
    return sign * (Number(x.dataset.v) - Number(y.dataset.v));
  };
  body.append(...[...body.rows].sort(compare));
}

// The values under a chart: at the cursor, or the last ones.

function readout(figure) {
  const { lines } = figure;
  const step = figure.step ?? state.range[1];
  const near = figure.all[figure.near];
  const values = new Map(lines.map((line) => [line, valueAt(line, step)]));
  const where = figure.step === null && state.range[1] === whole[1] ? "last" : `step ${atStep(step)}`;
  const runs = [...new Set(lines.map((line) => line.run))];
  if (!lines.length) return figure.readout.replaceChildren();
  const asTable = runs.length > 1 && lines.some((line) => line.task >= 0);
  figure.readout.replaceChildren(asTable ? valueTable(lines, runs, values, near, where) : valueItems(lines, values, near, where));
}

function marker(colour) {
  const made = element("i");
  made.style.background = colour;
  return made;
}

function isNear(line, near) {
  return near !== undefined && line.task === near.task && line.run === near.run;
}

// the line pointed at first, then the largest
function ranked(entries, near, size) {
  return entries.sort((a, b) => isNear(b, near) - isNear(a, near) || size(b) - size(a));
}

function valueItems(lines, values, near, where) {
  const size = (line) => Math.abs(values.get(line) ?? 0);
  const few = lines.length <= MAX_ITEMS;
  const shown = few ? lines : ranked([...lines], near, size).slice(0, MAX_ITEMS);
  const items = shown.map((line) => element("span", { class: isNear(line, near) && lines.length > 1 ? "item near" : "item" },
    marker(look(line.task, line.run).colour), `${line.label} `, element("b", {}, format(values.get(line)))));
  const rest = few ? [] : [element("span", {}, `and ${lines.length - shown.length} more`)];
  return element("div", { class: "items" }, element("span", {}, where), ...items, ...rest);
}

function valueTable(lines, runs, values, near, where) {
  const of = new Map(), byRun = state.colourBy === "run";
  for (const line of lines) of.set(line.task, [...(of.get(line.task) ?? []), line]);
  const size = ([, group]) => Math.max(...group.map((line) => Math.abs(values.get(line) ?? 0)));
  let rows = [...of];
  if (rows.length > MAX_ITEMS) {
    rows.sort((a, b) => (b[0] === near?.task) - (a[0] === near?.task) || size(b) - size(a));
    rows = rows.slice(0, MAX_ITEMS);
  }
  const head = element("tr", {}, element("th", {}, where), ...runs.map((run) =>
    element("th", { class: "n" }, ...(byRun ? [marker(hue(run))] : []), clipped(data.runs[run].name))));
  const body = rows.map(([task, group]) => element("tr", { class: task === near?.task ? "near" : "" },
    element("td", {}, ...(byRun ? [] : [marker(hue(task))]), clipped(data.tasks[task])),
    ...runs.map((run) => {
      const line = group.find((one) => one.run === run);
      return element("td", { class: "n" }, element("b", {}, line ? format(values.get(line)) : "–"));
    })));
  const rest = of.size > rows.length ? [element("tr", {}, element("td", {}, `and ${of.size - rows.length} more`))] : [];
  return element("div", { class: "scroll" }, element("table", {}, head, ...body, ...rest));
}

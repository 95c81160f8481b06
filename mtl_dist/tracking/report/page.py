"""Turns runs into one HTML file that works offline: data, styles and scripts are inside."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Any

from mtl_dist.tracking.report.groups import groups_section
from mtl_dist.tracking.report.panels import Panel, cosine_keys, make_panels, tasks_of, with_shares
from mtl_dist.tracking.report.read import RunData
from mtl_dist.tracking.report.tables import final_table, runs_table, settings_table
from mtl_dist.tracking.report.thin import Series, cosine_frames

# limits that keep the page below 2 MB: line values have 4 bytes each, cosine values 2
LINE_VALUES, COSINE_VALUES = 200_000, 180_000
MOST_VALUES, FEWEST_VALUES, MOST_FRAMES = 2400, 90, 300  # the first two per line, the last per run
SCRIPTS = (
    "data.js",
    "controls.js",
    "lines.js",
    "charts.js",
    "readout.js",
    "heatmap.js",
    "timeline.js",
    "main.js",
)


def render(runs: Sequence[RunData]) -> str:
    """The page as text. The same runs always give the same text."""
    runs = with_shares(runs)
    tasks = tasks_of(runs)
    panels, left_out = make_panels(runs, tasks)
    data, thinned = _data(runs, tasks, panels)
    notes = _notes(runs, thinned, left_out)
    style = _asset("uPlot.min.css") + _asset("report.css")
    uplot = f"/*\n{_asset('uPlot.LICENSE')}*/\n{_asset('uPlot.iife.min.js')}"
    script = '"use strict";\n(() => {\n' + "".join(map(_asset, SCRIPTS)) + "})();\n"
    title = "Runs " + ", ".join(run.name for run in runs) if len(runs) > 1 else f"Run {runs[0].name}"
    parts = {
        "csp": _policy([uplot, script], style),
        "title": escape(title),
        "heading": escape(title if len(title) < 120 else f"{len(runs)} runs"),
        "meta": escape(f"{_count(len(tasks), 'task')} · {_steps(runs)} · made by mtl_dist"),
        "runs": runs_table(runs, tasks),
        "notes": notes,
        "groups": groups_section(runs),
        "final": final_table(runs, tasks) if tasks else "<p>No run has values of tasks.</p>",
        "best": " The lowest validation loss of a task is bold." if len(runs) > 1 else "",
        "settings": settings_table(runs)
        if any(run.settings for run in runs)
        else "<p>No run has saved its settings.</p>",
        "style": style,
        "data": json_in_script(data),
        "uplot": uplot,
        "script": script,
    }
    # one pass: inserted text is not searched for further placeholders
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))


def json_in_script(values: Any) -> str:
    """JSON that is safe inside a script element: it cannot contain a closing tag."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _data(
    runs: Sequence[RunData], tasks: Sequence[str], panels: Sequence[Panel]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The data that the scripts read, and for each thinned run the number of rows per bucket."""
    keys = [line.key for panel in panels for line in panel.lines]
    pairs = {run.name: cosine_keys(run, tasks) for run in runs}
    num_lines = max(1, sum(key in run.columns for run in runs for key in keys))
    num_pairs = max(1, sum(map(len, pairs.values())))
    per_line = max(FEWEST_VALUES, min(MOST_VALUES, LINE_VALUES // num_lines))
    frames = min(MOST_FRAMES, COSINE_VALUES // num_pairs)
    described, thinned = [], {}
    for run in runs:
        series = Series(run.steps, per_line)
        values = {key: series.encode(run.columns[key]) for key in keys if key in run.columns}
        cosines = _cosines(run, pairs[run.name], frames)
        described.append({"name": run.name, "grids": series.grids, "series": values, "cosines": cosines})
        if not series.buckets.is_whole:
            thinned[run.name] = -(-len(run.steps) // len(series.buckets.starts))
    number = {task: index for index, task in enumerate(tasks)}
    charts = [
        {
            "title": panel.title,
            "caption": panel.caption,
            "section": panel.section,
            "zero": panel.zero,
            "lines": [{"key": line.key, "task": number.get(line.task or "", -1)} for line in panel.lines],
        }
        for panel in panels
    ]
    return {"tasks": list(tasks), "panels": charts, "runs": described}, thinned


def _cosines(run: RunData, pairs: dict[tuple[int, int], str], frames: int) -> dict[str, Any] | None:
    if not pairs or not len(run.steps):
        return None
    columns = [run.columns[key] for key in pairs.values()]
    return {"pairs": [list(pair) for pair in pairs], **cosine_frames(run.steps, columns, frames)}


def _notes(runs: Sequence[RunData], thinned: dict[str, int], left_out: Sequence[str]) -> str:
    lines = []
    for run in runs:
        notes = list(run.notes)
        if run.name in thinned:
            notes.append(
                f"The charts are thinned: of about every {thinned[run.name]} of the {len(run.steps)} rows, "
                "the smallest and the largest value are drawn, so no spike is lost. "
                "Smoothing uses the means. The tables use every row."
            )
        lines += [f"<li><b>{escape(run.name)}</b>: {escape(note)}</li>" for note in notes]
    if left_out:
        lines.append(f"<li>No chart for {len(left_out)} more keys: {escape(', '.join(left_out))}.</li>")
    return f'<ul class="notes">{"".join(lines)}</ul>' if lines else ""


def _steps(runs: Sequence[RunData]) -> str:
    last = {int(run.steps[-1]) if len(run.steps) else 0 for run in runs}
    return _count(min(last), "step") if len(last) == 1 else f"{min(last)} to {max(last)} steps"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _policy(scripts: Sequence[str], style: str) -> str:
    """Content-Security-Policy: allows only these scripts and styles, and no request at all."""
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'sha256-{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files(__package__) / "assets" / name).read_text(encoding="utf-8")

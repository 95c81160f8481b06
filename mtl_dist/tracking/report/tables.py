"""The tables of the page, as HTML. Every text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from mtl_dist.tracking.report.panels import (
    CONTRIBUTION,
    EVAL_LOSS,
    LOSS,
    NORM,
    WEIGHT,
    cosine_keys,
    metrics_of,
)
from mtl_dist.tracking.report.read import Floats, RunData

NONE = "–"


def runs_table(runs: Sequence[RunData], tasks: Sequence[str]) -> str:
    """One line per run: what it ran, and how much its gradients conflicted."""
    head = [
        "Run",
        "Weighting",
        "Steps",
        "Engine",
        "Processes",
        "Median step, ms",
        "Mean conflict rate",
        "Lowest mean cosine",
    ]
    return table("Runs", head, [_run_line(run, tasks) for run in runs], numeric=(2, 4, 5, 6))


def final_table(runs: Sequence[RunData], tasks: Sequence[str]) -> str:
    """The final values, one line per task and run. The lowest validation loss of a task is marked."""
    keys = dict.fromkeys(key for run in runs for key in run.columns)
    metrics = metrics_of(keys, tasks)
    names = list(dict.fromkeys(metric for _, _, metric in metrics))
    several = len(runs) > 1
    head = ["Task", *(["Run"] if several else []), "Validation loss", *names]
    head += ["Training loss", "Weight", "Gradient norm", "Contribution"]
    lines = []
    for task in tasks:
        losses = [last(run.columns.get(EVAL_LOSS + task)) for run in runs]
        best = min((loss for loss in losses if loss is not None), default=None) if several else None
        of_metric = {metric: key for key, owner, metric in metrics if owner == task}
        for run, loss in zip(runs, losses, strict=True):
            shown = [last(run.columns.get(of_metric.get(name, ""))) for name in names]
            shown += [last(run.columns.get(prefix + task)) for prefix in (LOSS, WEIGHT, NORM, CONTRIBUTION)]
            first = _number(loss, best=loss is not None and loss == best)
            lines.append([_text(task), *([_text(run.name)] if several else []), first, *map(_number, shown)])
    text_columns = 2 if several else 1
    return table("Final values", head, lines, numeric=range(text_columns, len(head)))


def settings_table(runs: Sequence[RunData]) -> str:
    """One line per setting, one column per run. Lines in which the runs differ are marked."""
    flat = [flatten(run.settings) for run in runs]
    lines, marked = [], set()
    for row, key in enumerate(dict.fromkeys(key for values in flat for key in values)):
        shown = [values.get(key, NONE) for values in flat]
        if len(set(shown)) > 1:
            marked.add(row)
        lines.append([_text(key), *map(_text, shown)])
    return table(
        "Configuration", ["Setting", *(run.name for run in runs)], lines, marked=marked, sortable=False
    )


def table(
    name: str,
    head: Sequence[str],
    lines: Sequence[Sequence[str]],
    *,
    numeric: Sequence[int] = (),
    marked: set[int] | frozenset[int] = frozenset(),
    sortable: bool = True,
) -> str:
    """An HTML table.

    Args:
        name: label of the table.
        head: column titles.
        lines: cells, already as HTML.
        numeric: columns of numbers, which are sorted with the largest first.
        marked: lines to highlight.
        sortable: whether a click on a heading sorts the table.
    """
    cells = []
    for column, title in enumerate(head):
        kind = ' class="n"' if column in numeric else ""
        inner = f'<button type="button">{escape(title)}</button>' if sortable else escape(title)
        cells.append(f'<th scope="col"{kind}>{inner}</th>')
    body = "\n".join(
        f"<tr{' class=differs' if row in marked else ''}>{''.join(line)}</tr>"
        for row, line in enumerate(lines)
    )
    kind = ' class="sortable"' if sortable else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}">'
        f"<table{kind}><thead><tr>{''.join(cells)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": 1}}` -> `{"a.b": "1"}`."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = _plain(value)
    return flat


def describe(spec: Any) -> str:
    """The specification of a rule in one line: `smooth(decay=0.9, rule=mgda)`."""
    if not isinstance(spec, Mapping):
        return _plain(spec)
    fields = ", ".join(f"{key}={describe(value)}" for key, value in spec.items() if key != "name")
    return f"{spec.get('name', '')}({fields})" if fields else str(spec.get("name", NONE))


def last(column: Floats | None) -> float | None:
    """The last finite value; None if there is none."""
    if column is None or not np.isfinite(column).any():
        return None
    return float(column[np.isfinite(column)][-1])


def _run_line(run: RunData, tasks: Sequence[str]) -> list[str]:
    step_ms, conflicts = run.columns.get("perf/step_ms"), run.columns.get("mtl/conflict_rate")
    means = {pair: _mean(run.columns[key]) for pair, key in cosine_keys(run, tasks).items()}
    known = {pair: mean for pair, mean in means.items() if mean is not None}
    i, j = min(known, key=lambda pair: known[pair], default=(0, 0))
    opposed = f"{tasks[i]} and {tasks[j]}, {known[i, j]:.3f}" if known else NONE
    return [
        _text(run.name),
        _text(describe(run.settings["weighting"]) if "weighting" in run.settings else NONE),
        _number(float(run.steps[-1]) if len(run.steps) else None),
        _text(run.engine or NONE),
        _number(run.num_processes),
        _number(None if step_ms is None or last(step_ms) is None else float(np.nanmedian(step_ms))),
        _number(_mean(conflicts)),
        _text(opposed),
    ]


def _mean(column: Floats | None) -> float | None:
    return None if last(column) is None or column is None else float(np.nanmean(column))


def _text(text: str) -> str:
    return f"<td>{escape(text)}</td>"


def _number(value: float | None, best: bool = False) -> str:
    """A cell with a number. The attribute `data-v` has the exact value, for sorting."""
    if value is None:
        return f'<td class="n">{NONE}</td>'
    shown = f"{value:.0f}" if value == int(value) and abs(value) < 1e9 else f"{value:.4g}"
    shown = f"<strong>{shown}</strong>" if best else shown
    return f'<td class="n" data-v="{value:.9g}">{shown}</td>'


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:g}" if isinstance(value, float) else str(value)

"""Finds tasks, pairs of tasks and charts from the keys of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mtl_dist.tracking.report.read import Floats, RunData

# prefix of the key, title, what to look for, whether the axis includes zero
PER_TASK = (
    (
        "mtl/weight/",
        "Weights",
        "A weight that stays near its maximum starves the other tasks. A weight that jumps is noise.",
        True,
    ),
    (
        "mtl/weight_share/",
        "Relative weights",
        "Weights divided by their sum. Use them to compare rules whose weights have different sums.",
        True,
    ),
    (
        "mtl/loss/",
        "Training losses",
        "Each loss should fall. A loss that rises while others fall belongs to a neglected task.",
        False,
    ),
    (
        "mtl/grad_norm/",
        "Gradient norms",
        "Where the probe measures them. If norms differ by powers of ten, equal weights are not fair.",
        False,
    ),
    (
        "mtl/contribution/",
        "Contributions",
        "|weight| × gradient norm, divided by the sum over tasks: how much each task moves the shared part.",
        True,
    ),
)
PER_RUN = (
    (
        "mtl/conflict_rate",
        "Conflict rate",
        "Fraction of task pairs whose gradients have a negative cosine.",
        True,
    ),
    (
        "mtl/weight_entropy",
        "Weight entropy",
        "In nats. log(number of tasks): all weights are equal. 0: one task has all the weight.",
        True,
    ),
    (
        "train/loss",
        "Weighted total loss",
        "Its scale depends on the weights. To compare runs, use the losses of the tasks.",
        False,
    ),
    (
        "perf/step_ms",
        "Step time, ms",
        "Wall time of a step. Data loading, checkpoints or another job cause spikes.",
        True,
    ),
    ("perf/sync_ms", "Synchronisation time, ms", "Time in the all-reduce of the statistics.", True),
)
WEIGHT, SHARE, LOSS, NORM, CONTRIBUTION = (prefix for prefix, *_ in PER_TASK)
COSINE, EVAL_LOSS = "mtl/cosine/", "eval/loss/"
SILENT = {"mtl/held"}  # a note tells it in words
MAX_OTHERS = 12


@dataclass(frozen=True)
class Line:
    """One line per run in a chart: the key in the rows, and the task it belongs to, if any."""

    key: str
    task: str | None = None


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: a short title.
        caption: what to look for.
        section: the heading above it.
        lines: the lines that are drawn for every run.
        zero: whether a linear axis includes zero.
    """

    title: str
    caption: str
    section: str
    lines: tuple[Line, ...]
    zero: bool


def tasks_of(runs: Iterable[RunData]) -> tuple[str, ...]:
    """All tasks, in the order of their first appearance."""
    prefixes = (WEIGHT, LOSS, NORM, CONTRIBUTION)
    found = (
        key.removeprefix(prefix)
        for run in runs
        for prefix in prefixes
        for key in run.columns
        if key.startswith(prefix)
    )
    return tuple(dict.fromkeys(found))


def cosine_keys(run: RunData, tasks: Sequence[str]) -> dict[tuple[int, int], str]:
    """(i, j) -> key of the pair, for `i < j` in `tasks`. A task name may itself contain `__`."""
    pairs = combinations(enumerate(tasks), 2)
    keys = {(i, j): (f"{COSINE}{a}__{b}", f"{COSINE}{b}__{a}") for (i, a), (j, b) in pairs}
    return {pair: key for pair, names in keys.items() for key in names if key in run.columns}


def with_shares(runs: Sequence[RunData]) -> list[RunData]:
    """The runs with contributions that sum to 1 per step, and, for several runs, relative weights."""
    found = [run.columns | _shares(run, CONTRIBUTION, CONTRIBUTION) for run in runs]
    if len(runs) > 1:
        found = [columns | _shares(run, WEIGHT, SHARE) for run, columns in zip(runs, found, strict=True)]
    return [replace(run, columns=columns) for run, columns in zip(runs, found, strict=True)]


def _shares(run: RunData, prefix: str, target: str) -> dict[str, Floats]:
    keys = [key for key in run.columns if key.startswith(prefix)]
    if not keys:
        return {}
    stacked = np.abs(np.stack([run.columns[key] for key in keys]).astype(np.float64))
    total = np.nansum(stacked, axis=0)
    shares = np.full_like(stacked, np.nan)
    np.divide(stacked, total, out=shares, where=total > 0)
    names = [target + key.removeprefix(prefix) for key in keys]
    return dict(zip(names, shares.astype(np.float32), strict=True))


def make_panels(runs: Sequence[RunData], tasks: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """The charts for which at least one run has values, and the keys that have no chart for lack of room."""
    keys = list(dict.fromkeys(key for run in runs for key, column in run.columns.items() if _any(column)))
    panels = [
        Panel(title, caption, "Training", _lines(prefix, tasks, keys), zero)
        for prefix, title, caption, zero in PER_TASK
    ]
    panels += [
        Panel(title, caption, "Training", (Line(key),) if key in keys else (), zero)
        for key, title, caption, zero in PER_RUN
    ]
    panels += _validation(keys, tasks)
    drawn = {line.key for panel in panels for line in panel.lines} | SILENT
    others = [key for key in keys if key not in drawn and not key.startswith(COSINE)]
    panels += [
        Panel(key, "Another value that the run logged.", "Other", (Line(key),), False)
        for key in others[:MAX_OTHERS]
    ]
    return [panel for panel in panels if panel.lines], others[MAX_OTHERS:]


def _validation(keys: Sequence[str], tasks: Sequence[str]) -> list[Panel]:
    losses = _lines(EVAL_LOSS, tasks, keys)
    caption = "On samples outside the training data. If it rises while the training loss falls: overfitting."
    panels = [Panel("Validation losses", caption, "Validation", losses, False)]
    by_metric: dict[str, list[Line]] = {}
    for key, task, metric in metrics_of(keys, tasks):
        by_metric.setdefault(metric, []).append(Line(key, task))
    return panels + [
        Panel(metric, "Validation metric of each task.", "Validation", tuple(lines), False)
        for metric, lines in by_metric.items()
    ]


def metrics_of(keys: Iterable[str], tasks: Iterable[str]) -> list[tuple[str, str, str]]:
    """(key, task, metric) of every `eval/<task>/<metric>`."""
    known, found = set(tasks), []
    for key in keys:
        task, slash, metric = key.removeprefix("eval/").rpartition("/")
        is_loss = key.startswith(EVAL_LOSS) and key.removeprefix(EVAL_LOSS) in known
        if key.startswith("eval/") and slash and task in known and not is_loss:
            found.append((key, task, metric))
    return found


def _lines(prefix: str, tasks: Iterable[str], keys: Sequence[str]) -> tuple[Line, ...]:
    present = set(keys)
    return tuple(Line(prefix + task, task) for task in tasks if prefix + task in present)


def _any(column: Floats) -> bool:
    return bool(np.isfinite(column).any())

"""Keys of rows -> tasks, pairs of tasks, and the charts that show them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from mtl_dist.tracking.report.read import Floats, RunData

# prefix of the key, title, what to look for, whether zero belongs on the axis
PER_TASK = (
    (
        "mtl/weight/",
        "Weights",
        "A weight that stays at an end starves the others; a jumping one is noise.",
        True,
    ),
    (
        "mtl/weight_share/",
        "Weight shares",
        "Weights over their sum: comparable between rules whose weights add up to different totals.",
        True,
    ),
    (
        "mtl/loss/",
        "Training losses",
        "Each should fall; one that rises while others fall is being given up.",
        False,
    ),
    (
        "mtl/grad_norm/",
        "Gradient norms",
        "At the shared features. Lines decades apart mean that equal weights would not be equal.",
        False,
    ),
    (
        "mtl/contribution/",
        "Contributions",
        "Share of |weight| × gradient norm: who moves the shared part. Parallel lines mean balance.",
        True,
    ),
)
PER_RUN = (
    ("mtl/conflict_rate", "Conflict rate", "Share of task pairs whose gradients oppose each other.", True),
    (
        "mtl/weight_entropy",
        "Weight entropy",
        "In nats. Log of the number of tasks: equal weights; 0: one has all.",
        True,
    ),
    (
        "train/loss",
        "Weighted total loss",
        "Its scale follows the weights: compare runs by the tasks' losses.",
        False,
    ),
    (
        "perf/step_ms",
        "Step time, ms",
        "Wall time of a step. Spikes are data loading, checkpoints or another job.",
        True,
    ),
    ("perf/sync_ms", "Synchronisation time, ms", "Spent in the all-reduce of the statistics.", True),
)
WEIGHT, SHARE, LOSS, NORM, CONTRIBUTION = (prefix for prefix, *_ in PER_TASK)
COSINE, EVAL_LOSS = "mtl/cosine/", "eval/loss/"
SILENT = {"mtl/held"}  # told in words
MAX_OTHERS = 12


@dataclass(frozen=True)
class Line:
    """One value of every run: its key in the rows, and the task that it belongs to, if any."""

    key: str
    task: str | None = None


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: short.
        caption: one sentence, what to look for.
        section: heading under which it stands.
        lines: what is drawn for every run.
        zero: whether a linear axis includes zero.
    """

    title: str
    caption: str
    section: str
    lines: tuple[Line, ...]
    zero: bool


def tasks_of(runs: Iterable[RunData]) -> tuple[str, ...]:
    """All tasks in the order in which they appear first."""
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
    """(i, j) -> key of the pair, for `i < j` in `tasks`. Names may hold `__` themselves."""
    pairs = combinations(enumerate(tasks), 2)
    keys = {(i, j): (f"{COSINE}{a}__{b}", f"{COSINE}{b}__{a}") for (i, a), (j, b) in pairs}
    return {pair: key for pair, names in keys.items() for key in names if key in run.columns}


def with_shares(runs: Sequence[RunData]) -> list[RunData]:
    """The runs with each contribution over the sum of the step's; of several runs the weights' shares too."""
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
    """The charts for which some run has values, and the keys for which there was no room."""
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
        Panel(key, "Logged beside the rest.", "Other", (Line(key),), False) for key in others[:MAX_OTHERS]
    ]
    return [panel for panel in panels if panel.lines], others[MAX_OTHERS:]


def _validation(keys: Sequence[str], tasks: Sequence[str]) -> list[Panel]:
    losses = _lines(EVAL_LOSS, tasks, keys)
    caption = "On samples that training never saw. Turning up while training losses fall is overfitting."
    panels = [Panel("Validation losses", caption, "Validation", losses, False)]
    by_metric: dict[str, list[Line]] = {}
    for key, task, metric in metrics_of(keys, tasks):
        by_metric.setdefault(metric, []).append(Line(key, task))
    return panels + [
        Panel(metric, "Validation metric, per task.", "Validation", tuple(lines), False)
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

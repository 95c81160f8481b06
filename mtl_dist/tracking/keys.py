"""Names of the columns. Every tracker, dashboard and report relies on them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

STEP_KEY = "train/global_step"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


# prefix of a column: the least and the largest value that it can have
_POSSIBLE = {
    "mtl/cosine/": (-1.0, 1.0),
    "mtl/conflict_rate": (0.0, 1.0),
    "mtl/contribution/": (0.0, math.inf),
    "mtl/grad_norm/": (0.0, math.inf),
    "mtl/weight_entropy": (0.0, math.inf),
    "mtl/held": (0.0, math.inf),
    "perf/": (0.0, math.inf),
}
_ROUNDING = 1e-6  # of a cosine that another program computed in float32


def possible(key: str) -> tuple[float, float]:
    """The range of a column, with room for rounding errors; infinite where every number is possible."""
    found = (limits for prefix, limits in _POSSIBLE.items() if key.startswith(prefix))
    low, high = next(found, (-math.inf, math.inf))
    return low - _ROUNDING, high + _ROUNDING


@dataclass(frozen=True)
class Keys:
    """The columns of some tasks, in task order. Pairs are ordered as by `itertools.combinations`."""

    weight: tuple[str, ...]
    loss: tuple[str, ...]
    grad_norm: tuple[str, ...]
    contribution: tuple[str, ...]
    cosine: tuple[str, ...]


@lru_cache(maxsize=64)
def keys_of(tasks: tuple[str, ...]) -> Keys:
    """The columns of `tasks`.

    Raises:
        ValueError: a task name cannot be part of a column name.
    """
    check_task_names(tasks)
    weight, loss, grad_norm, contribution = (
        tuple(f"mtl/{kind}/{task}" for task in tasks)
        for kind in ("weight", "loss", "grad_norm", "contribution")
    )
    cosine = tuple(f"mtl/cosine/{a}__{b}" for a, b in combinations(tasks, 2))
    return Keys(weight, loss, grad_norm, contribution, cosine)


@dataclass(frozen=True)
class EvaluationKeys:
    """The columns of an evaluation: each task's loss, and their total in fixed weights."""

    loss: dict[str, str]
    total: str


def evaluation_keys(tasks: Sequence[str], prefix: str = "eval", name: str = "") -> EvaluationKeys:
    """`eval_loss/<task>` and `eval_total_loss`, as HF Trainer wants evaluation columns to begin.

    W&B and TensorBoard show them as `eval/loss/<task>`. The total ends in `loss`, because Trainer takes the
    largest value of any other column for the best one.

    Args:
        tasks: task names.
        prefix: "eval", "test", or "eval_<data set>".
        name: of a second balancer, whose columns are `eval_<name>/loss/<task>`.
    """
    of = f"{prefix}_{name}/" if name else f"{prefix}_"
    return EvaluationKeys({task: f"{of}loss/{task}" for task in tasks}, f"{of}total_loss")


def check_task_names(tasks: Sequence[str]) -> None:
    """Raises an error for task names that cannot be part of a key, and for one that is given twice.

    Raises:
        ValueError: a name stands twice, contains `__`, or characters besides letters, digits, `_`, `.` and
            `-`.
    """
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"tasks: give each task once, got {list(tasks)}")
    for task in tasks:
        if not _NAME.fullmatch(task) or "__" in task:
            raise ValueError(
                f"task {task!r} cannot be part of a column name: use letters, digits, '.', '-' and "
                "single '_' ('__' separates the two tasks of a cosine)"
            )

"""Names of the columns. Every tracker, dashboard and report relies on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

STEP_KEY = "train/global_step"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")


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


def check_task_names(tasks: Sequence[str]) -> None:
    """Raises an error for task names that cannot be part of a key.

    Raises:
        ValueError: a name has characters besides letters, digits, `_`, `.` and `-`, or contains `__`.
    """
    for task in tasks:
        if not _NAME.fullmatch(task) or "__" in task:
            raise ValueError(
                f"task {task!r} cannot be part of a column name: use letters, digits, '.', '-' and "
                "single '_' ('__' separates the two tasks of a cosine)"
            )

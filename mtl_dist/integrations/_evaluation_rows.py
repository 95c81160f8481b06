"""Each task's evaluation loss, and their total in fixed weights, for trainers that choose by a number."""

from __future__ import annotations

import math
from collections.abc import Mapping

from mtl_dist.balancer import Balancer
from mtl_dist.tracking import Row, evaluation_keys

Weights = Mapping[str, float]


def checked_weights(balancer: Balancer, given: Weights | None) -> Weights:
    """The fixed weights of the total: those given, or `1 / n`.

    Raises:
        ValueError: a task has none, or one that is not a finite number.
    """
    if given is None:
        return dict.fromkeys(balancer.tasks, 1 / len(balancer.tasks))
    if set(given) != set(balancer.tasks) or not all(math.isfinite(w) for w in given.values()):
        raise ValueError(
            f"eval_weights must give each of the tasks {list(balancer.tasks)} a finite number, "
            f"got {dict(given)}"
        )
    return dict(given)


def evaluation_row(losses: Mapping[str, float], weights: Weights, prefix: str, name: str) -> Row:
    """The columns of one evaluation. The total takes the tasks that had samples in it.

    Args:
        losses: mean loss of each task that had samples.
        weights: fixed weight of each task.
        prefix: of the keys: "eval", "test".
        name: of the balancer; empty for the first.
    """
    if not losses:
        return {}
    keys = evaluation_keys(tuple(weights), prefix, name)
    row = {keys.loss[task]: losses[task] for task in weights if task in losses}
    row[keys.total] = math.fsum(weights[task] * loss for task, loss in losses.items())
    return row

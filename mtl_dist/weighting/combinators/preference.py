"""Preference: the importance of each task for the user, multiplied with the weights of another rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import per_task


@dataclass(frozen=True)
class Preference(Combinator):
    """`αᵢ ← pᵢ αᵢ`, with the weights α of the inner rule.

    The preferences do not scale the losses that the inner rule reads. Most rules cancel such a scale (1/L,
    1/‖g‖, the geometric mean), and the preferences would have no effect. The guarantees of the inner rule
    hold for its own weights, not for the products: with unequal preferences MGDA's update can raise a loss.

    Attributes:
        rule: the inner rule.
        weights: the preferences `pᵢ >= 0`, by task name or in task order.
    """

    name = "preference"
    paper = "combinator"
    cost = "O(n) + inner rule"

    weights: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "weights", self.weights, zero=True)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The preferences, and the state of the inner rule."""
        preference = per_task(self.weights, tasks, device, "Preference: weights")
        return {"preference": preference, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ ← pᵢ αᵢ`."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        preference = state["preference"]
        return preference * weights, {"preference": preference, **nest("rule", inner)}

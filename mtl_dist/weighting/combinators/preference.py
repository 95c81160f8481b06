"""Preference: how much each task matters to the user, on top of another rule."""

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
    """`αᵢ ← pᵢ αᵢ`: the preferences multiply the weights that `rule` gives.

    They do not scale the losses that the rule sees: most rules undo exactly that (1/L, 1/‖g‖, the geometric
    mean), and the preference would vanish. In return a rule's guarantee holds for its own weights, not for
    the product: with unequal preferences MGDA's update may raise a loss.

    Attributes:
        weights: the preferences `pᵢ`, non-negative, by name or in task order.
    """

    weights: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        check_positive(self, "weights", self.weights, zero=True)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The preferences."""
        preference = per_task(self.weights, tasks, device, "Preference: weights")
        return {"preference": preference, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ ← pᵢ αᵢ`."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        preference = state["preference"]
        return preference * weights, {"preference": preference, **nest("rule", inner)}

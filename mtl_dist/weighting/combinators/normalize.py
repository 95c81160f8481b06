"""Normalize: fix the sum of another rule's weights, so that it does not act on the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_positive


@dataclass(frozen=True)
class Normalize(Combinator):
    """`αᵢ ← total · αᵢ / Σⱼ |αⱼ|`, the sum over the tasks present.

    Absolute values, because some rules give negative weights: their plain sum can vanish, or turn the update
    into an ascent. Weights that are all zero stay zero.

    Attributes:
        total: what the weights sum to; None is the number of tasks present, so that the mean weight is 1.
    """

    total: float | None = None

    def __post_init__(self) -> None:
        if self.total is not None:
            check_positive(self, "total", self.total)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The rule's weights, rescaled."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        weights = torch.where(stats.present, weights, torch.zeros_like(weights))
        # divided by the largest first: the sum of weights near the largest float would overflow
        largest = weights.abs().amax()
        weights = weights / torch.where(largest > 0, largest, torch.ones_like(largest))
        total = stats.num_present if self.total is None else self.total
        # α_i <- total α_i / Σ_j |α_j|; the sum is at least 1 unless all are zero
        return total * weights / weights.abs().sum().clamp(min=1), nest("rule", inner)

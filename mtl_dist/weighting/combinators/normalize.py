"""Normalize: fixes the sum of another rule's weights, so that they do not change the learning rate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_positive


@dataclass(frozen=True)
class Normalize(Combinator):
    """`αᵢ ← total · αᵢ / Σⱼ |αⱼ|`, where the sum is over the tasks present.

    The sum is of absolute values because some rules give negative weights. Their plain sum can be 0, or
    negative, and a negative sum would turn descent into ascent. If all weights are zero, they stay zero.

    Attributes:
        rule: the inner rule.
        total: new sum of `|αᵢ|`; None is the number of tasks present, so that the mean of `|αᵢ|` is 1.
    """

    name = "normalize"
    paper = "combinator"
    cost = "O(n) + inner rule"

    total: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.total is not None:
            check_positive(self, "total", self.total)

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """(0, 0): the scale of the inner weights has no influence."""
        return None if self.rule.degrees is None else (0, 0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The weights of the inner rule, rescaled."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        weights = torch.where(stats.present, weights, torch.zeros_like(weights))
        # divided by the largest weight first, because the sum of very large weights would overflow
        largest = weights.abs().amax()
        weights = weights / torch.where(largest > 0, largest, torch.ones_like(largest))
        total = stats.num_present if self.total is None else self.total
        # αᵢ ← total αᵢ / Σⱼ |αⱼ|; now the sum is at least 1 unless all weights are zero
        return total * weights / weights.abs().sum().clamp(min=1), nest("rule", inner)

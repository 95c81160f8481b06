"""Clamp: bounds on the weights of another rule."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_number


@dataclass(frozen=True)
class Clamp(Combinator):
    """`αᵢ ← min(max(αᵢ, low), high)`.

    Attributes:
        rule: the inner rule.
        low: lower bound; -inf for no bound.
        high: upper bound; inf for no bound.
    """

    name = "clamp"
    paper = "combinator"
    cost = "O(n) + inner rule"

    low: float = 0.0
    high: float = math.inf

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self, "low", self.low, infinite=True)
        check_number(self, "high", self.high, infinite=True)
        if not self.low <= self.high:
            raise ValueError(f"Clamp: low must be <= high, got low={self.low}, high={self.high}")
        if self.low == math.inf or self.high <= 0:
            raise ValueError(
                "Clamp: low must be finite or -inf, and high above 0, or nothing can be trained; got "
                f"low={self.low}, high={self.high}"
            )

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """Those of the inner rule if they are 0: the bounds are in units of the weights."""
        return (0, 0) if self.rule.degrees == (0, 0) else None

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The weights of the inner rule, clipped to the bounds."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        return weights.clamp(self.low, self.high), nest("rule", inner)

"""Smooth: exponential moving average of another rule's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_fraction
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Smooth(Combinator):
    """Bias-corrected moving average `ᾱ = Σ_s dᵗ⁻ˢ αₛ / Σ_s dᵗ⁻ˢ` of the weights of `rule`.

    A task's average only moves at steps where the task is present.

    Attributes:
        decay: `d` in [0, 1); 0 is `rule` itself, 0.99 remembers about 100 steps.
    """

    decay: float = 0.9

    def __post_init__(self) -> None:
        check_fraction(self, "decay", self.decay, one=False)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Sums of discounted weights and of the discounts."""
        zeros = constant(0.0, len(tasks), device)
        return {"sum": zeros, "norm": zeros, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The moving average after this step's weights."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        # S <- dS + α, N <- dN + 1, ᾱ = S / N
        total = torch.where(stats.present, self.decay * state["sum"] + weights, state["sum"])
        norm = torch.where(stats.present, self.decay * state["norm"] + 1, state["norm"])
        return total / norm.clamp(min=1), {"sum": total, "norm": norm, **nest("rule", inner)}

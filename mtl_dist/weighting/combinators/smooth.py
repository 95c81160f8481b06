"""Smooth: exponential moving average of the weights of another rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.checks import check_fraction, check_other_batches
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Smooth(Combinator):
    """Bias-corrected moving average `ᾱ = Σ_s dᵗ⁻ˢ αₛ / Σ_s dᵗ⁻ˢ` of the weights of the inner rule.

    The average of a task changes only in steps where the task is present.

    Attributes:
        rule: the inner rule.
        decay: `d` in [0, 1); 0 is the inner rule itself, 0.99 averages over about 100 steps.
    """

    name = "smooth"
    paper = "combinator"
    cost = "O(n) + inner rule"

    decay: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction(self, "decay", self.decay, one=False)
        check_other_batches(self, self.rule)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Discounted sums of the weights, sums of the discounts, and the state of the inner rule."""
        zeros = constant(0.0, len(tasks), device)
        return {"sum": zeros, "norm": zeros, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The moving average, which includes the weights of this step."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        # S ← dS + α, N ← dN + 1, ᾱ = S / N
        total = torch.where(stats.present, self.decay * state["sum"] + weights, state["sum"])
        norm = torch.where(stats.present, self.decay * state["norm"] + 1, state["norm"])
        return total / norm.clamp(min=1), {"sum": total, "norm": norm, **nest("rule", inner)}

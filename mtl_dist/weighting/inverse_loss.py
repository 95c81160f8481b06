"""Inverse loss: every loss in units of its current value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State


@dataclass(frozen=True)
class InverseLoss(Rule):
    """`αᵢ = 1 / sg(Lᵢ)`: the gradient of `Σ log Lᵢ`, parallel to that of the geometric mean.

    sg is the stop-gradient. The value of the total is always n; only its gradient carries information. Su,
    "On multi-task learning I", kexue.fm/archives/8870; "scale-invariant linear scalarisation" in Navon et
    al., ICML 2022.
    """

    name = "inverse_loss"
    paper = "Su, kexue.fm/archives/8870"
    cost = "O(n)"
    degrees = (-1, 0)
    positive_losses = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / Lᵢ`."""
        return stats.losses.reciprocal(), state

"""Geometric mean: scale-free, because it weighs every task by its inverse loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.helpers import mean_present


@dataclass(frozen=True)
class GeometricMean(Rule):
    """Gradient of the geometric mean `M = (Π Lᵢ)^(1/n)` of the global losses: `αᵢ = M / (n Lᵢ)`.

    Scaling one task's loss does not change the update's direction. Chennupati et al., CVPRW 2019 (GLS);
    Su, "On multi-task learning I", kexue.fm/archives/8870.
    """

    positive_losses = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = M / (n Lᵢ)`, n and M over the tasks present."""
        # log M = mean_j log L_j
        log_mean = mean_present(stats.losses.log(), stats)
        # α_i = exp(log M - log L_i) / n
        return torch.exp(log_mean - stats.losses.log()) / stats.num_present, state

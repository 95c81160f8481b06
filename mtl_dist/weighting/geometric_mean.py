"""Geometric mean of the losses: independent of the scale of each loss."""

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

    Scaling one loss does not change the direction of the update. Chennupati et al., CVPRW 2019 (GLS); Su, "On
    multi-task learning I", kexue.fm/archives/8870.
    """

    name = "geometric_mean"
    paper = "Chennupati et al., CVPRW 2019"
    cost = "O(n)"
    degrees = (0, 0)
    positive_losses = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = M / (n Lᵢ)`, with n and M over the tasks present."""
        # log M = meanⱼ log Lⱼ
        log_mean = mean_present(stats.losses.log(), stats)
        # αᵢ = exp(log M - log Lᵢ) / n
        return torch.exp(log_mean - stats.losses.log()) / stats.num_present, state

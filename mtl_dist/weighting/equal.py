"""Equal weights: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State


@dataclass(frozen=True)
class Equal(Rule):
    """`αᵢ = 1/n`: the mean of the losses. n is the number of tasks present."""

    name = "equal"
    paper = "baseline"
    cost = "O(n)"
    degrees = (0, 0)

    compares: ClassVar[bool] = False

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1/n`."""
        return torch.ones_like(stats.losses) / stats.num_present, state

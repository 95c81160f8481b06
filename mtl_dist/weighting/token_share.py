"""Token share: each task counts as much as its tokens, so the total is the mean over all tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State


@dataclass(frozen=True)
class TokenShare(Rule):
    """`αᵢ = Cᵢ / Σⱼ Cⱼ`: the total `Σ Cᵢ Lᵢ / Σ Cⱼ` is the mean over all tokens (or samples) of all tasks.

    This is what a trainer does that knows no tasks, so it is the baseline for batches in which every sample
    has one task. C are the counts of all ranks, and of the whole optimizer step where the engine knows them
    (`Engine.counts`). Refused with a lag or a window, where C would be the counts of another batch.
    """

    name = "token_share"
    paper = "baseline"
    cost = "O(n)"
    degrees = (0, 0)

    compares: ClassVar[bool] = False
    own_batch: ClassVar[bool] = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = Cᵢ / Σⱼ Cⱼ`."""
        total = stats.counts.sum()
        return stats.counts / torch.where(total > 0, total, 1), state

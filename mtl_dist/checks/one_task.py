"""Notices that every step has samples of one task only, and that the rule gives all tasks the same weight."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_dist.checks.recent import STREAK, Recent

_EQUAL = 1e-6  # of the largest weight


class OneTaskWatch(Recent):
    """Looks for loops that take one task per batch, under rules that compare tasks.

    It takes the weights of each step, `[n]`, 0 for absent tasks.
    """

    def holds(self, recent: list[Tensor]) -> bool:
        """Whether each step had one task, several tasks took turns, and all had the same weight."""
        rows = torch.stack(recent)
        present = rows != 0
        alone = bool((present.sum(1) == 1).all()) and int(present.any(0).sum()) > 1
        used = rows[present]
        return alone and bool(used.max() - used.min() <= _EQUAL * used.abs().max())

    def text(self) -> str:
        """What happens, and what to use instead."""
        return (
            f"mtl_dist: each of the last {STREAK} steps had samples of one task only, and {self.rule!r} gave "
            "all tasks the same weight, because it compares the tasks of one step. Use LastSeen(rule), which "
            "compares the latest statistics of each task, or Balancer(..., window=k) for k batches per step"
        )

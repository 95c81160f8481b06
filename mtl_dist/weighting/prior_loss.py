"""Prior loss: every loss in units of the loss of the best constant prediction."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import per_task


@dataclass(frozen=True)
class PriorLoss(Rule):
    """`αᵢ = 1 / Lᵢᵖʳⁱᵒʳ`, with the loss of the best constant prediction.

    A weighted loss of 1 means that nothing was learned from the input. `Lᵢᵖʳⁱᵒʳ` is the entropy of the label
    frequencies for classification, and the variance of the labels for regression. `mtl_dist.priors` computes
    both. Su, "On multi-task learning I", kexue.fm/archives/8870.

    Attributes:
        losses: the prior loss of each task, by task name or in task order.
    """

    name = "prior_loss"
    paper = "Su, kexue.fm/archives/8870"
    cost = "O(n)"
    degrees = (0, 0)

    losses: Mapping[str, float] | Sequence[float]

    def __post_init__(self) -> None:
        check_positive(self, "losses", self.losses)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """One number for each name."""
        return cls({task: 1.0 + zlib.crc32(task.encode()) % 5 for task in tasks})

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The prior losses."""
        return {"losses": per_task(self.losses, tasks, device, "PriorLoss: losses")}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / Lᵢᵖʳⁱᵒʳ`."""
        return state["losses"].reciprocal(), state

"""Fixed weights: chosen by hand or found by a search."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import per_task


@dataclass(frozen=True)
class Fixed(Rule):
    """`αᵢ = wᵢ`: the given weights, not divided by n and not normalised.

    Attributes:
        weights: one non-negative number per task, by task name or in task order.
    """

    name = "fixed"
    paper = "baseline"
    cost = "O(n)"
    degrees = (0, 0)

    weights: Mapping[str, float] | Sequence[float]

    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "weights", self.weights, zero=True)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """One number for each name."""
        return cls({task: 1.0 + zlib.crc32(task.encode()) % 5 for task in tasks})

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The weights, as a tensor on the device."""
        return {"weights": per_task(self.weights, tasks, device, "Fixed: weights")}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = wᵢ`."""
        return state["weights"].clone(), state

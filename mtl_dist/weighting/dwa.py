"""DWA: more weight for tasks whose loss fell slowly in the last epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_positive
from mtl_dist.weighting.helpers import constant, softmax_present


@dataclass(frozen=True)
class DWA(Rule):
    """Dynamic weight average: `αᵢ = n softmax(r/T)ᵢ`, `rᵢ = L̄ᵢ(e-1) / L̄ᵢ(e-2)`, `L̄(e)` the mean over epoch e.

    Liu, Johns and Davison, CVPR 2019. The rates r are 1 until two epochs have ended. An epoch is `interval`
    steps in which the task is present. LibMTL and TorchJD use epochs of the data set (set `interval` to the
    number of steps in one); the Nash-MTL and FAMO repositories use a sliding window of 25 steps.

    Attributes:
        interval: steps per epoch.
        temperature: `T`; a larger value gives more equal weights.
    """

    name = "dwa"
    paper = "Liu, Johns and Davison, CVPR 2019"
    cost = "O(n)"
    degrees = (0, 0)

    interval: int = 100
    temperature: float = 2.0

    positive_losses = True

    def __post_init__(self) -> None:
        check_count(self, "interval", self.interval)
        check_positive(self, "temperature", self.temperature)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Loss sums of the current and the last two epochs; steps in the current epoch; finished epochs."""
        keys = ("sum", "last", "before_last", "steps", "epochs")
        return {key: constant(0.0, len(tasks), device) for key in keys}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights from the last two epochs. The losses of this step are added to the current epoch."""
        # rᵢ = L̄ᵢ(e-1) / L̄ᵢ(e-2): both sums are over `interval` steps
        rates = torch.where(state["epochs"] >= 2, state["last"] / state["before_last"], 1.0)
        weights = stats.num_present * softmax_present(rates / self.temperature, stats.present)

        total = torch.where(stats.present, state["sum"] + stats.losses, state["sum"])
        steps = torch.where(stats.present, state["steps"] + 1, state["steps"])
        over = steps >= self.interval
        return weights, {
            "sum": torch.where(over, 0.0, total),
            "last": torch.where(over, total, state["last"]),
            "before_last": torch.where(over, state["last"], state["before_last"]),
            "steps": torch.where(over, 0.0, steps),
            "epochs": torch.where(over, state["epochs"] + 1, state["epochs"]),
        }

"""DWA: weight follows how slowly a loss fell lately."""

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

    Liu, Johns and Davison, CVPR 2019. The rates are 1 until two epochs are over. An epoch is `interval`
    steps in which the task is present. LibMTL and TorchJD take the data set's epochs (set `interval` to the
    steps in one); the Nash-MTL and FAMO repositories slide a window of 25 steps.

    Attributes:
        interval: steps in an epoch.
        temperature: `T`; larger is closer to equal weights.
    """

    interval: int = 100
    temperature: float = 2.0

    positive_losses = True

    def __post_init__(self) -> None:
        check_count(self, "interval", self.interval)
        check_positive(self, "temperature", self.temperature)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Loss sums of this epoch and of the last two; steps in this epoch; epochs so far."""
        keys = ("sum", "last", "before_last", "steps", "epochs")
        return {key: constant(0.0, len(tasks), device) for key in keys}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights from the epochs before; this step's losses enter the running epoch."""
        # r_i = L_i(e-1) / L_i(e-2): both sums are over `interval` steps
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

"""LogSumExp: a smooth maximum of the losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import softmax_present


@dataclass(frozen=True)
class LogSumExp(Rule):
    """Gradient of the smooth maximum `S = T log Σ exp(Lᵢ/T)`: `α = softmax(L/T)`.

    The weights do not change if a constant is added to every loss. They do depend on the units of the losses.
    For losses in different units use `GeneralizedMean`, which is this smooth maximum of log L.

    Attributes:
        temperature: `T > 0`, in units of the losses; T → 0 is the maximum, T → ∞ equal weights.
    """

    name = "log_sum_exp"
    paper = "textbook smooth maximum"
    cost = "O(n)"

    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "temperature", self.temperature)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = softmax(L/T)` over the tasks present."""
        return softmax_present(stats.losses / self.temperature, stats.present), state

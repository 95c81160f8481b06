"""COSMOS: a weighted sum of the losses that also turns the vector of losses towards a preference."""

from __future__ import annotations

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
class COSMOS(Rule):
    """Gradient of `S = Σ rᵢLᵢ - λ cos(r, L)`: `α = r - (λ/‖L‖)(r/‖r‖ - cos(r, L) L/‖L‖)`.

    Ruchte and Grabocka, ICDM 2021. λ has no good value for all problems: the paper has 0.01 to 8. A large λ
    makes weights negative, so that a loss which is small beside its preference may rise. The paper also draws
    r anew for every batch and gives it to the model; here r is fixed. The losses are global: cos is not
    linear, and cosines of each rank's own losses would give another gradient.

    Attributes:
        penalty: λ >= 0, in the unit of the losses.
        weights: r > 0, by task name or in task order; None is 1/n, with n tasks present.
    """

    name = "cosmos"
    paper = "Ruchte and Grabocka, ICDM 2021"
    cost = "O(n)"

    penalty: float
    weights: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "penalty", self.penalty, zero=True)
        if self.weights is not None:
            check_positive(self, "weights", self.weights)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """λ = 0.5."""
        return cls(0.5)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The preference r; 1 where it is to be 1/n, because n is known only in the step."""
        return {"weights": per_task(self.weights, tasks, device, "COSMOS: weights")}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = r - (λ/‖L‖)(r/‖r‖ - cos(r, L) L/‖L‖)`."""
        r = torch.where(stats.present, state["weights"], 0.0)
        if self.weights is None:
            r = r / stats.num_present
        losses = torch.where(stats.present, stats.losses, 0.0)
        length = losses.norm()
        length = torch.where(length > 0, length, torch.inf)  # S has no slope there: the cosine is left out
        preferred, towards = r / r.norm().clamp(min=torch.finfo(r.dtype).tiny), losses / length
        # α = r - (λ/‖L‖)(r̂ - ⟨r̂, L̂⟩ L̂)
        turn = preferred - (preferred * towards).sum() * towards
        return r - self.penalty / length * turn, state

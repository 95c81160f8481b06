"""PBI: distance along a preferred direction, and a penalty for leaving it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import per_task


@dataclass(frozen=True)
class PBI(Rule):
    """Gradient of `S = d₁ + θd₂`, `d₁ = ⟨L - z, ŵ⟩`, `d₂ = ‖L - z - d₁ŵ‖`: `α = ŵ + θ(L - z - d₁ŵ)/d₂`.

    Penalty-based boundary intersection, Zhang and Li, MOEA/D, IEEE Transactions on Evolutionary Computation,
    2007. `ŵ = w/‖w‖` is the preferred direction of the losses seen from the ideal point z. A loss that is
    small beside its preference has a negative weight if θ is large, and may rise. On the preferred direction
    d₂ has no slope, and `α = ŵ`. The losses are global, because d₂ is not linear in them.

    Attributes:
        theta: θ >= 0; the paper has 5.
        weights: w > 0, by task name or in task order; None is equal.
        reference: the ideal point z, below all losses, by task name or in task order; None is 0.
    """

    name = "pbi"
    paper = "Zhang and Li, IEEE TEVC, 2007"
    cost = "O(n)"

    theta: float = 5.0
    weights: Mapping[str, float] | Sequence[float] | None = None
    reference: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "theta", self.theta, zero=True)
        if self.weights is not None:
            check_positive(self, "weights", self.weights)

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # depends on a setting
        """(0, 0); None with an ideal point, which is in the unit of the losses."""
        return None if self.reference else (0, 0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The direction w and the ideal point z."""
        return {
            "weights": per_task(self.weights, tasks, device, "PBI: weights"),
            "reference": per_task(self.reference, tasks, device, "PBI: reference", default=0.0),
        }

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = ŵ + θ(L - z - d₁ŵ)/d₂`."""
        w = torch.where(stats.present, state["weights"], 0.0)
        rounding = torch.finfo(w.dtype)
        direction = w / w.norm().clamp(min=rounding.tiny)
        seen = torch.where(stats.present, stats.losses - state["reference"], 0.0)
        # d₁ = ⟨L - z, ŵ⟩, d₂ = ‖L - z - d₁ŵ‖
        aside = seen - (seen * direction).sum() * direction
        d2 = aside.norm()
        # what is no longer than a rounding error is 0
        d2 = torch.where(d2 > 8 * len(w) * rounding.eps * seen.norm(), d2, torch.inf)
        return direction + self.theta * aside / d2, state

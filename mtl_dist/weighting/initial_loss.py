"""Initial loss: every loss in units of its value at the start of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_positive
from mtl_dist.weighting.helpers import constant, per_task


@dataclass(frozen=True)
class InitialLoss(Rule):
    """`αᵢ = 1 / Lᵢⁱⁿⁱᵗ`: the total `Σ Lᵢ / Lᵢⁱⁿⁱᵗ` does not depend on the units of the losses.

    Su, "On multi-task learning I", kexue.fm/archives/8870. `Lᵢⁱⁿⁱᵗ` is the mean of the losses in the first
    `steps` steps where the task is present (of the losses so far, if there are fewer). Alternatively it is
    given, for example by `mtl_dist.priors`: log K for K classes, E‖y‖² for regression. A measured loss must
    stay positive; if it can reach 0, give `losses`.

    Attributes:
        steps: number of first losses of each task that are averaged.
        losses: the initial losses, by task name or in task order; None measures them.
    """

    name = "initial_loss"
    paper = "Su, kexue.fm/archives/8870"
    cost = "O(n)"

    steps: int = 10
    losses: Mapping[str, float] | Sequence[float] | None = None

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # given losses are checked in __post_init__
        """Whether the rule measures losses and divides by them."""
        return self.losses is None

    def __post_init__(self) -> None:
        check_count(self, "steps", self.steps)
        if self.losses is not None:
            check_positive(self, "losses", self.losses)

    @property
    def degrees(self) -> tuple[float, float]:  # type: ignore[override]  # depends on a setting
        """(-1, 0), or (0, 0) where the initial losses are given."""
        return (-1, 0) if self.losses is None else (0, 0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Sum and number of the first losses of each task."""
        if self.losses is not None:
            given = per_task(self.losses, tasks, device, "InitialLoss: losses")
            return {"sum": self.steps * given, "seen": constant(self.steps, len(tasks), device)}
        zeros = constant(0.0, len(tasks), device)
        return {"sum": zeros, "seen": zeros.clone()}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / Lᵢⁱⁿⁱᵗ`. This step's losses are included until there are `steps` of them."""
        measuring = stats.present & (state["seen"] < self.steps)
        total = torch.where(measuring, state["sum"] + stats.losses, state["sum"])
        seen = torch.where(measuring, state["seen"] + 1, state["seen"])
        # αᵢ = k / Σ_t Lᵢ(t); 1 for a task that was never present
        weights = torch.where(seen > 0, seen / total, torch.ones_like(seen))
        return weights, {"sum": total, "seen": seen}

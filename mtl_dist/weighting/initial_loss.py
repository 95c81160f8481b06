"""Initial state: every loss in units of its value before training."""

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
    """`αᵢ = 1 / Lᵢⁱⁿⁱᵗ`: the total `Σ Lᵢ / Lᵢⁱⁿⁱᵗ` does not depend on the losses' units.

    Su, "On multi-task learning I", kexue.fm/archives/8870. `Lᵢⁱⁿⁱᵗ` is the mean of the first `steps` losses
    of the task (of those seen so far while there are fewer), counting steps where the task is present; or it
    is given, for instance from `mtl_dist.priors`: log K for K classes, E‖y‖² for regression. A measured loss
    must stay positive; give `losses` where one may reach 0.

    Attributes:
        steps: how many first losses of each task are averaged.
        losses: the initial losses, by name or in task order; then nothing is measured.
    """

    steps: int = 10
    losses: Mapping[str, float] | Sequence[float] | None = None

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # given losses are checked here, once
        """Whether losses are measured, and divided by."""
        return self.losses is None

    def __post_init__(self) -> None:
        check_count(self, "steps", self.steps)
        if self.losses is not None:
            check_positive(self, "losses", self.losses)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Sum and number of the first losses of each task."""
        if self.losses is not None:
            given = per_task(self.losses, tasks, device, "InitialLoss: losses")
            return {"sum": self.steps * given, "seen": constant(self.steps, len(tasks), device)}
        zeros = constant(0.0, len(tasks), device)
        return {"sum": zeros, "seen": zeros.clone()}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / Lᵢⁱⁿⁱᵗ`, this step's loss included while fewer than `steps` were seen."""
        measuring = stats.present & (state["seen"] < self.steps)
        total = torch.where(measuring, state["sum"] + stats.losses, state["sum"])
        seen = torch.where(measuring, state["seen"] + 1, state["seen"])
        # α_i = k / Σ_t L_i(t); 1 for a task never seen, which is absent now
        weights = torch.where(seen > 0, seen / total, torch.ones_like(seen))
        return weights, {"sum": total, "seen": seen}

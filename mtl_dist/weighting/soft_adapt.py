"""SoftAdapt: weights from the last change of each loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_choice, check_positive
from mtl_dist.weighting.helpers import constant, softmax_present

Rate = Literal["ratio", "difference"]


@dataclass(frozen=True)
class SoftAdapt(Rule):
    """`αᵢ = n softmax(βs)ᵢ` with the rates `sᵢ = Lᵢ(t) / Lᵢ(t-1)`: a loss that falls slowly gets more weight.

    Heydari, Thompson and Mehmood, 2019. Their rate is the difference `Lᵢ(t) - Lᵢ(t-1)`, with β = 0.1 and
    weights that sum to 1. PhysicsNeMo-Sym uses the ratio, with β = 1 and weights that sum to n. That is the
    default here, because the ratio does not depend on the units of the losses. In the first step where a task
    is present, its loss counts as unchanged.

    Attributes:
        beta: `β > 0`; a larger value gives less equal weights.
        rate: "ratio", or "difference" as in the paper.
    """

    name = "soft_adapt"
    paper = "Heydari, Thompson and Mehmood, 2019"
    cost = "O(n)"

    beta: float = 1.0
    rate: Rate = "ratio"

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Whether the rule divides by losses."""
        return self.rate == "ratio"

    def __post_init__(self) -> None:
        check_positive(self, "beta", self.beta)
        check_choice(self, "rate", self.rate, get_args(Rate))

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # depends on a setting
        """(0, 0); None for differences, which are in units of the losses."""
        return None if self.rate == "difference" else (0, 0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The losses of the last step, and whether there was a last step."""
        seen = torch.zeros(len(tasks), dtype=torch.bool, device=device)
        return {"losses": constant(1.0, len(tasks), device), "seen": seen}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = n softmax(βs)ᵢ` over the tasks present."""
        before = torch.where(state["seen"], state["losses"], stats.losses)
        # sᵢ = Lᵢ(t) / Lᵢ(t-1), or Lᵢ(t) - Lᵢ(t-1)
        s = stats.losses / before if self.rate == "ratio" else stats.losses - before
        # αᵢ = n softmax(βs)ᵢ
        weights = stats.num_present * softmax_present(self.beta * s, stats.present)
        losses = torch.where(stats.present, stats.losses, state["losses"])
        return weights, {"losses": losses, "seen": state["seen"] | stats.present}

"""Rules whose formula starts from a preferred combination of the tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting._base import Needs, Rule, State, per_task
from mtl_dist.weighting._checks import check_positive


@dataclass(frozen=True)
class PreferenceRule(Rule):
    """A rule of gradients that takes a preference inside its formula, before conflicts are resolved.

    `Preference(rule, weights)` multiplies afterwards instead, and loses the rule's guarantee.

    Attributes:
        preference: `wᵢ >= 0`, by name or in task order; None for the rule's own equal values.
    """

    needs = Needs.GRAM

    preference: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.preference is not None:
            check_positive(self, "preference", self.preference, zero=True)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The preference, where one is given."""
        if self.preference is None:
            return {}
        return {"preference": per_task(self.preference, tasks, device, f"{type(self).__name__}: preference")}

    def preferred(self, stats: TaskStats, state: State, *, mean: bool) -> Tensor:
        """`[n]`, the preference given, else `1/n` over the tasks present (`mean`), or 1."""
        default = torch.ones_like(stats.losses)
        return state.get("preference", default / stats.num_present if mean else default)

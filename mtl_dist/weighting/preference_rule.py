"""Rules whose formula starts from a preferred combination of the tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_dist.solvers import Array
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import on_present, per_task


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

    def on_preferred(
        self, solver: Callable[[Array, Array], Array], stats: TaskStats, state: State, *, mean: bool
    ) -> Tensor:
        """`on_present` of a solver that takes the preference too: that given, else `1/n` (`mean`) or 1."""
        if "preference" in state:
            return on_present(solver, stats, state["preference"])

        def solve(gram: Array) -> Array:
            return solver(gram, np.full(len(gram), 1 / len(gram) if mean else 1.0))

        return on_present(solve, stats)

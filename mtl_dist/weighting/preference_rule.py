"""The base of rules with preferences inside their formula."""

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
    """A rule that applies preferences w to the gradients before it resolves conflicts.

    In contrast, `Preference(rule, weights)` multiplies the final weights, so the rule's guarantee is lost.

    Attributes:
        preference: `wᵢ >= 0`, by task name or in task order; None for equal values that the rule defines.
    """

    needs = Needs.GRAM

    preference: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.preference is not None:
            check_positive(self, "preference", self.preference, zero=True)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The preferences, if given."""
        if self.preference is None:
            return {}
        return {"preference": per_task(self.preference, tasks, device, f"{type(self).__name__}: preference")}

    def on_preferred(
        self, solver: Callable[[Array, Array], Array], stats: TaskStats, state: State, *, mean: bool
    ) -> Tensor:
        """`on_present` for a solver of the Gram matrix and the preferences.

        Args:
            solver: a function of the Gram matrix, `[m, m]`, and w, `[m]`, of the m tasks present.
            stats: statistics with a Gram matrix.
            state: result of `init`.
            mean: preferences if none were given: `1/m` if true, 1 if false.

        Returns:
            `[n]` weights; 0 for absent tasks.
        """
        if "preference" in state:
            return on_present(solver, stats, state["preference"])

        def solve(gram: Array) -> Array:
            return solver(gram, np.full(len(gram), 1 / len(gram) if mean else 1.0))

        return on_present(solve, stats)

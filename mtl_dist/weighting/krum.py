"""Krum: only the gradients that lie closest to the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import Array
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_count
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class Krum(Rule):
    """`αᵢ = 1/m` for the m tasks with the smallest `Σⱼ ‖gᵢ - gⱼ‖²` over their `n - f - 2` nearest, 0 else.

    Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017. Made for workers of which f lie, not
    for tasks; of use where some tasks' gradients are broken. `‖gᵢ - gⱼ‖² = Gᵢᵢ + Gⱼⱼ - 2Gᵢⱼ`. TorchJD sums
    the distances instead of their squares. Of equal scores the task that comes first is taken.

    Attributes:
        num_byzantine: f, how many gradients may be broken. With fewer than `f + 3` tasks present, the one
            nearest neighbour counts.
        num_selected: m, at most the number of tasks present.
    """

    needs = Needs.GRAM

    num_byzantine: int = 0
    num_selected: int = 1

    def __post_init__(self) -> None:
        check_count(self, "num_byzantine", self.num_byzantine, low=0)
        check_count(self, "num_selected", self.num_selected)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`1/m` for those selected."""
        return on_present(self._solve, stats), state

    def _solve(self, gram: Array) -> Array:
        n = len(gram)
        squares = gram.diagonal()
        # ‖g_i - g_j‖² = G_ii + G_jj - 2 G_ij
        distances = np.maximum(np.add.outer(squares, squares) - 2 * gram, 0.0)
        np.fill_diagonal(distances, np.inf)
        nearest = np.sort(distances, axis=1)[:, : max(n - self.num_byzantine - 2, 1)]
        selected = np.argsort(nearest.sum(1), kind="stable")[: self.num_selected]
        weights = np.zeros(n)
        weights[selected] = 1 / len(selected)
        return weights

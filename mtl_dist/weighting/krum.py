"""Krum: selects the gradients that are closest to the others."""

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
    """`αᵢ = 1/m` for the m tasks with the smallest `Σⱼ ‖gᵢ - gⱼ‖²` over the `n - f - 2` nearest gⱼ, else 0.

    Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017. The method was made for workers, of
    which f send wrong gradients. Here it is useful if the gradients of some tasks are broken. TorchJD sums
    the distances, not their squares. If scores are equal, the first task in task order is selected.

    Attributes:
        num_byzantine: f, the number of gradients that may be broken. With fewer than `f + 3` tasks present,
            only the nearest neighbour counts.
        num_selected: m; if fewer tasks are present, all of them are selected.
    """

    name = "krum"
    paper = "Blanchard et al., NeurIPS 2017"
    cost = "O(n² log n), host"
    degrees = (0, 0)
    breaks = {"permutation": "of tasks with equal scores the first is taken"}
    needs = Needs.GRAM

    num_byzantine: int = 0
    num_selected: int = 1

    def __post_init__(self) -> None:
        check_count(self, "num_byzantine", self.num_byzantine, low=0)
        check_count(self, "num_selected", self.num_selected)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`1/m` for the selected tasks, 0 for the others."""
        return on_present(self._solve, stats), state

    def _solve(self, gram: Array) -> Array:
        n = len(gram)
        squares = gram.diagonal()
        # ‖gᵢ - gⱼ‖² = Gᵢᵢ + Gⱼⱼ - 2Gᵢⱼ
        distances = np.maximum(np.add.outer(squares, squares) - 2 * gram, 0.0)
        np.fill_diagonal(distances, np.inf)
        nearest = np.sort(distances, axis=1)[:, : max(n - self.num_byzantine - 2, 1)]
        selected = np.argsort(nearest.sum(1), kind="stable")[: self.num_selected]
        weights = np.zeros(n)
        weights[selected] = 1 / len(selected)
        return weights

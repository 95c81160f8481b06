"""MGDA: the convex combination of task gradients that is shortest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting._base import Needs, Rule, State, on_present
from mtl_dist.weighting._simplex import min_norm_point


@dataclass(frozen=True)
class MGDA(Rule):
    """Multiple-gradient descent: `α = argmin αᵀGα` over the simplex, solved exactly.

    `u = Σ αᵢgᵢ` satisfies `⟨gᵢ, u⟩ >= ‖u‖²` for every task, so no loss rises to first order, and `u = 0`
    exactly at a Pareto-stationary point. Where several α give the same u (linearly dependent gradients) any
    one of them is returned, the same on every rank.

    Sener and Koltun, NeurIPS 2018; Désidéri 2012. Their Frank-Wolfe and projected-gradient iterations stop at
    a tolerance; here an active-set method ends at a vertex set whose optimality conditions hold.
    """

    needs = Needs.GRAM

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Minimum-norm weights; they sum to 1 over the tasks present."""
        return on_present(min_norm_point, stats), state

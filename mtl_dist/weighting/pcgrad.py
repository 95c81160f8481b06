"""PCGrad: removes from each gradient its conflicts with the other gradients, one after another."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.solvers import Array
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_count
from mtl_dist.weighting.helpers import on_present, random_orders


@dataclass(frozen=True)
class PCGrad(Rule):
    """`gᵢ ← gᵢ - ⟨gᵢ, gⱼ⟩/‖gⱼ‖² gⱼ` where `⟨gᵢ, gⱼ⟩ < 0`, for j in random order; `u = Σᵢ gᵢ`.

    The projected `gᵢ` is `Σₖ cᵢₖgₖ`, and `α = Σᵢ cᵢ`. With three or more tasks, a later projection can bring
    back an earlier conflict, so losses can rise. Weights are at least 1. A task with zero gradient gets 1.

    Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, Algorithm 1. Each task has its own
    random order, as in LibMTL and TorchJD. The official code of Nash-MTL shuffles one list for all tasks.

    Attributes:
        seed: seed of the random orders, which depend only on the seed and the step.
    """

    name = "pcgrad"
    paper = "Yu et al., NeurIPS 2020"
    cost = "O(n³), host"
    degrees = (0, 0)
    breaks = {"permutation": "random orders are drawn by position, not by name"}
    needs = Needs.GRAM

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, low=0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = Σᵢ cᵢ` for the orders of this step."""
        return on_present(
            lambda gram: project_conflicts(gram, random_orders(len(gram), self.seed, stats.step)), stats
        ), state


def project_conflicts(gram: Array, orders: NDArray[np.intp]) -> Array:
    """Weights, for all tasks i at once.

    Args:
        gram: `[n, n]`.
        orders: `[n, n]`; gᵢ is projected in the order of row i.
    """
    if len(gram) == 2:
        return _of_two(gram)
    rows = np.arange(len(gram))
    squares = gram.diagonal()
    c = np.eye(len(gram))
    dots = gram.copy()  # ⟨Σₖ cᵢₖgₖ, gⱼ⟩
    for j in orders.T:
        conflict = (dots[rows, j] < 0) & (j != rows) & (squares[j] > 0)
        # cᵢⱼ -= ⟨Σₖ cᵢₖgₖ, gⱼ⟩ / ‖gⱼ‖²
        step = np.where(conflict, -dots[rows, j] / np.where(conflict, squares[j], 1.0), 0.0)
        c[rows, j] += step
        dots += step[:, None] * gram[j]
    result: Array = c.sum(0)
    return result


def _of_two(gram: Array) -> Array:
    """Two tasks: `αⱼ = 1 - min(⟨gᵢ, gⱼ⟩, 0)/‖gⱼ‖²`."""
    (first, cross), (_, second) = gram.tolist()
    return np.array([1 - min(cross, 0.0) / square if square > 0 else 1.0 for square in (first, second)])

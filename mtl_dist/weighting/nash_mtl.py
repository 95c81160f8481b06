"""Nash-MTL: the update that solves a bargaining game between the tasks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import Array, among_nonzero, fair_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class NashMTL(Rule):
    """The Nash bargaining solution: `αᵢ(Gα)ᵢ = 1`, the maximum of `Σ log⟨gᵢ, d⟩` over a ball.

    Every task improves, and the direction does not change if one loss is scaled. `‖Σ αᵢgᵢ‖ = √n` exactly. So
    for n > 1 the clipping to norm 1 in the official code always has an effect. It is part of the rule, as
    `max_norm`.

    Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022. The official code solves up to 20
    convex programs that start at the previous α. Here damped Newton steps solve `min ½ αᵀGα - Σ log αᵢ`,
    which has the same unique solution. Near Pareto-stationary points the weights grow, while the norm of the
    update stays the same. At such a point there is no solution: the weights are about 1e7 times their usual
    size, and the direction of the update is arbitrary. A task with zero gradient is left out of the problem
    and gets the mean of the other weights.

    Attributes:
        max_norm: largest norm of the update, >= 0; 0 for no clipping.
    """

    name = "nash_mtl"
    paper = "Navon et al., ICML 2022"
    cost = "O(n³) per iteration, host"
    degrees = (0, -1)
    needs = Needs.GRAM

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "max_norm", self.max_norm, zero=True)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α min(1, max_norm/√n)` with `αᵢ(Gα)ᵢ = 1`."""
        return on_present(among_nonzero(self._solve), stats), state

    def _solve(self, gram: Array) -> Array:
        # αᵢ(Gα)ᵢ = 1
        alpha = fair_weights(gram, power=1.0)
        # ‖u‖² = αᵀGα = n
        shortening = min(1.0, self.max_norm / np.sqrt(len(gram))) if self.max_norm else 1.0
        return shortening * alpha

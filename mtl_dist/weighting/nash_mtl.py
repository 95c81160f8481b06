"""Nash-MTL: the update the tasks would agree on by bargaining."""

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

    Every task improves, and the direction does not change when a task is scaled. `‖Σ αᵢgᵢ‖ = √n` exactly, so
    the official code's clipping to norm 1 always acts; it belongs to the rule and is kept as `max_norm`.

    Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022. The official code runs up to 20 convex
    programs from the previous α; here damped Newton steps solve `min ½ αᵀGα - Σ log αᵢ`, whose only minimum
    this is. Near Pareto-stationary points the weights grow, while the update keeps its length; at such a
    point there is no solution, and the weights are about 1e7 times their usual size, the update anything. A
    task without gradient takes no part and gets the mean of the others' weights.

    Attributes:
        max_norm: the update is shortened to this length; 0 for `αᵢ(Gα)ᵢ = 1` as it stands.
    """

    needs = Needs.GRAM

    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "max_norm", self.max_norm, zero=True)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α min(1, max_norm/√n)` with `αᵢ(Gα)ᵢ = 1`."""
        return on_present(among_nonzero(self._solve), stats), state

    def _solve(self, gram: Array) -> Array:
        # α_i (Gα)_i = 1
        alpha = fair_weights(gram, power=1.0)
        # ‖u‖² = αᵀGα = n
        shortening = min(1.0, self.max_norm / np.sqrt(len(gram))) if self.max_norm else 1.0
        return shortening * alpha

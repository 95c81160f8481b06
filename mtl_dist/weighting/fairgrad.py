"""FairGrad: α-fair resource allocation among the tasks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.solvers import Array, among_nonzero, fair_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class FairGrad(Rule):
    """`(Gw)ᵢ = wᵢ^(-1/α)`: the maximum of the α-fair utility `Σ ⟨gᵢ, d⟩^(1-α) / (1-α)` over a ball.

    Every task improves. α = 1 is proportional fairness, Nash-MTL without its clipping; α → 0 is the sum of
    the losses; α → ∞ is max-min fairness, the direction of MGDA.

    Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, equation 4. The official code,
    LibMTL and TorchJD call a least-squares solver with bounds from 1/n, which may stop early; here damped
    Newton steps solve the strictly convex problem of which this equation is the optimality condition. At a
    Pareto-stationary point there is no solution, and weights are large but finite. A task without gradient
    takes no part and gets the mean of the others' weights.

    Attributes:
        alpha: α > 0, how much the slowest task counts.
    """

    needs = Needs.GRAM

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "alpha", self.alpha)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`(Gw)ᵢ = wᵢ^(-1/α)`."""
        return on_present(among_nonzero(self._solve), stats), state

    def _solve(self, gram: Array) -> Array:
        return fair_weights(gram, power=1 / self.alpha)

"""FairGrad: α-fair allocation of progress to the tasks."""

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

    Here w are the weights and α is a hyperparameter. Every task improves. α = 1 is proportional fairness, as
    in Nash-MTL without its clipping; α → 0 is the sum of the losses; α → ∞ is max-min fairness, the direction
    of MGDA.

    Ban and Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, equation 4. The official code,
    LibMTL and TorchJD use a bounded least-squares solver that starts at 1/n and may stop early. Here damped
    Newton steps solve the strictly convex problem whose optimality condition this equation is. At a
    Pareto-stationary point there is no solution, and the weights are large but finite. A task with zero
    gradient is left out of the problem and gets the mean of the other weights.

    Attributes:
        alpha: α > 0; a larger value favours the slowest task more.
    """

    name = "fairgrad"
    paper = "Ban and Ji, ICML 2024"
    cost = "O(n³) per iteration, host"
    needs = Needs.GRAM

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self, "alpha", self.alpha)

    @property
    def degrees(self) -> tuple[float, float]:  # type: ignore[override]  # depends on a setting
        """`(0, -2α/(1 + α))`, from `s²w = w^(-1/α)`."""
        return (0, -2 * self.alpha / (1 + self.alpha))

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`(Gw)ᵢ = wᵢ^(-1/α)`."""
        return on_present(among_nonzero(self._solve), stats), state

    def _solve(self, gram: Array) -> Array:
        return fair_weights(gram, power=1 / self.alpha)

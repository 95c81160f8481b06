"""CAGrad: the update near the mean gradient with the largest improvement of the worst task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from mtl_dist.solvers import Array, conflict_averse
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_choice, check_positive
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class CAGrad(Rule):
    """`max_d minᵢ ⟨gᵢ, d⟩` subject to `‖d - g₀‖ <= c‖g₀‖`, `g₀ = Σ gᵢ/n`: `α = 1/n + (c‖g₀‖/‖g_w‖) w`.

    w minimises `⟨g_w, g₀⟩ + c‖g₀‖‖g_w‖` over the simplex, where `g_w = Σ wᵢgᵢ`. If `c < 1`, the update is 0
    only if `g₀ = 0`, at the stationary points of the mean loss. `c = 0` is `Equal`.

    Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, Algorithm 1. LibMTL
    and the official code minimise by SLSQP, and the official code multiplies the result by n. TorchJD returns
    zeros below a gradient norm of 1e-2. Here the optimality conditions hold up to rounding at every scale.
    At a Pareto-stationary point `g_w = 0`, and the formula is 0/0. Every d in the ball with
    `minᵢ ⟨gᵢ, d⟩ = 0` is then optimal, and the rule takes the one nearest to g₀, as `DualProj` does.

    Attributes:
        c: radius of the ball around g₀ in units of `‖g₀‖`, >= 0; 0.5 in the paper's toy example and in
            LibMTL, 0.4 in the paper's vision experiments.
        rescale: α is divided by 1 (0, the paper's algorithm), by `1 + c²` (1, the official code) or by
            `1 + c` (2, the official toy example).
    """

    name = "cagrad"
    paper = "Liu et al., NeurIPS 2021"
    cost = "convex program, host"
    degrees = (0, 0)
    needs = Needs.GRAM

    c: float = 0.5
    rescale: Literal[0, 1, 2] = 0

    def __post_init__(self) -> None:
        check_positive(self, "c", self.c, zero=True)
        check_choice(self, "rescale", self.rescale, (0, 1, 2))

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = 1/n + (c‖g₀‖/‖g_w‖) w`."""
        return on_present(self._solve, stats), state

    def _solve(self, gram: Array) -> Array:
        result: Array = conflict_averse(gram, self.c) / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]
        return result

"""IMGrad: CAGrad whose interest in the worst task follows from how much the tasks disagree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import EPS, Array, conflict_averse, min_norm_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class IMGrad(Rule):
    """`α = (1/n + (a‖g₀‖/‖g_w‖) w) / (1 + a²)`, w minimises `(1.5 - c) ⟨g_w, g₀⟩ + c a‖g₀‖‖g_w‖`.

    `g₀ = Σ gᵢ/n` is the mean gradient, `g_w = Σ wᵢgᵢ` with w in the simplex, and `c = cos(g₀, g_m)` with the
    shortest convex combination g_m (that of MGDA). With c = 0.75, this is CAGrad with `c = a`. The smaller c,
    the more w looks for the task that g₀ serves worst, and the less for a short g_w.

    Imbalance-sensitive gradient descent, Zhou et al., IJCAI 2025 (arXiv 2503.08006), with the official code's
    division by `1 + a²`. That code finds g_m by iterations to a tolerance, w by SLSQP, and adds 1e-8 to norms
    at every scale. Here both are solved exactly, and the host is asked once. At a Pareto-stationary point
    `g_m = 0`, and then c = 0: w is the task with the smallest `⟨gᵢ, g₀⟩`.

    Attributes:
        a: radius of the ball around g₀ in units of `‖g₀‖`, >= 0; the official runs have 0.8. 0 is `Equal`.
    """

    name = "imgrad"
    paper = "Zhou et al., IJCAI 2025"
    cost = "convex program, host"
    degrees = (0, 0)
    needs = Needs.GRAM

    a: float = 0.8

    def __post_init__(self) -> None:
        check_positive(self, "a", self.a, zero=True)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = (1/n + (a‖g₀‖/‖g_w‖) w) / (1 + a²)`."""
        return on_present(self._solve, stats), state

    def _solve(self, gram: Array) -> Array:
        n = len(gram)
        u: Array = np.full(n, 1 / n)
        result: Array = (u + self._extra(gram, u)) / (1 + self.a**2)
        return result

    def _extra(self, gram: Array, u: Array) -> Array:
        """`(a‖g₀‖/‖g_w‖) w`."""
        n, mean = len(gram), gram @ u  # ⟨gᵢ, g₀⟩
        length = float(np.maximum(u @ mean, 0.0)) ** 0.5  # ‖g₀‖
        m = min_norm_weights(gram)
        shortest = float(np.maximum(m @ gram @ m, 0.0)) ** 0.5  # ‖g_m‖
        if self.a == 0 or length == 0:
            return np.zeros(n)
        if shortest <= (8 * n * EPS) ** 0.5 * float(m @ np.sqrt(gram.diagonal())):
            return self._stationary(gram, mean, length)
        # c = cos(g₀, g_m)
        c = min(float(m @ mean) / (length * shortest), 1.0)
        # divided by 1.5 - c the problem is CAGrad's, whose solution is 1/n + (radius ‖g₀‖/‖g_w‖) w
        radius = self.a * c / (1.5 - c)
        result: Array = (conflict_averse(gram, radius) - u) * (self.a / radius)
        return result

    def _stationary(self, gram: Array, mean: Array, length: float) -> Array:
        """The limit for c = 0, where w minimises `⟨g_w, g₀⟩`."""
        worst = int(mean.argmin())
        result: Array = np.zeros(len(gram))
        if gram[worst, worst] > 0:
            result[worst] = self.a * length / float(gram[worst, worst]) ** 0.5
        return result

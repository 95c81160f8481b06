"""UPGrad: projects every gradient so that it conflicts with no other, and adds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import Array, project_on_dual_cone
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import State
from mtl_dist.weighting.preference_rule import PreferenceRule


@dataclass(frozen=True)
class UPGrad(PreferenceRule):
    """`α = Σᵢ argmin vᵀGv` over `v >= wᵢeᵢ`, with `w = 1/n`: unconflicting projection of gradients.

    Each `wᵢgᵢ` is projected on the dual cone `{d : ⟨gⱼ, d⟩ >= 0 for all j}`. The sum is in the cone too, so
    no loss rises to first order. If one loss is scaled, the update is a linear function of the factor, unlike
    that of MGDA.

    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232, equation 3. TorchJD
    adds 1e-4 of the trace to the diagonal of G, and returns the mean below a gradient norm of 1e-2. Here the
    problems are solved for G itself, at every scale. If gradients are linearly dependent, the update is
    unique but the weights are not; the rule returns the most equal ones. A task with zero gradient gets `wᵢ`.

    Attributes:
        preference: `w`; None is `1/n` over the tasks present.
    """

    name = "upgrad"
    paper = "Quinton and Rey, arXiv 2406.16232"
    cost = "n QPs, host"
    degrees = (0, 0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The sum of the weights of all projections."""
        return self.on_preferred(_sum_of_projections, stats, state, mean=True), state


def _sum_of_projections(gram: Array, preference: Array) -> Array:
    result: Array = project_on_dual_cone(gram, np.diag(preference)).sum(1)
    return result

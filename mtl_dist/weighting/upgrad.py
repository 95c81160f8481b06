"""UPGrad: every gradient projected so that it conflicts with none, then summed."""

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

    Each `wᵢgᵢ` is projected on the dual cone `{d : ⟨gⱼ, d⟩ >= 0 for all j}`. The sum lies in the cone too, so
    no loss rises to first order, and it is linear in a scaling of each task, unlike MGDA.

    Quinton and Rey, Jacobian Descent for Multi-Objective Optimization, arXiv 2406.16232, equation 3. TorchJD
    adds 1e-4 of the trace to G's diagonal, and returns the mean below a gradient norm of 1e-2; here the
    problems are solved for G itself, at every scale. Where gradients are linearly dependent, the update is
    unique and the weights are not: the most even ones are returned. A task without gradient gets `wᵢ`.

    Attributes:
        preference: `w`; None for `1/n` over the tasks present.
    """

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Sum of the projections' weights."""
        return self.on_preferred(_sum_of_projections, stats, state, mean=True), state


def _sum_of_projections(gram: Array, preference: Array) -> Array:
    result: Array = project_on_dual_cone(gram, np.diag(preference)).sum(1)
    return result

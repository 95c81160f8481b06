"""DualProj: the mean gradient, projected so that it conflicts with no task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.solvers import project_on_dual_cone
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import State
from mtl_dist.weighting.preference_rule import PreferenceRule


@dataclass(frozen=True)
class DualProj(PreferenceRule):
    """`α = argmin vᵀGv` over `v >= w`, `w = 1/n`: the update nearest to `Σ wᵢgᵢ` that no loss rises along.

    Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 11, with every task as a
    constraint. TorchJD adds 1e-4 of the trace to G's diagonal, and returns `w` below a gradient norm of 1e-2;
    here the problem is solved for G itself, at every scale. Where gradients are linearly dependent, the
    update is unique and the weights are not: the most even ones are returned. A task without gradient gets
    `wᵢ`.

    Attributes:
        preference: `w`; None for `1/n` over the tasks present.
    """

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights of the projection."""
        return self.on_preferred(project_on_dual_cone, stats, state, mean=True), state

"""DualProj: the mean gradient, projected so that it does not conflict with any task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mtl_dist.solvers import project_on_dual_cone
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import State
from mtl_dist.weighting.preference_rule import PreferenceRule


@dataclass(frozen=True)
class DualProj(PreferenceRule):
    """`α = argmin vᵀGv` over `v >= w`, `w = 1/n`: the update nearest to `Σ wᵢgᵢ` that raises no loss.

    Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 11, with one constraint per task.
    TorchJD adds 1e-4 of the trace to the diagonal of G, and returns `w` below a gradient norm of 1e-2. Here
    the problem is solved for G itself, at every scale. If gradients are linearly dependent, the update is
    unique but the weights are not; the rule returns the most equal ones. A task with zero gradient gets `wᵢ`.

    Attributes:
        preference: `w`; None is `1/n` over the tasks present.
    """

    name = "dual_proj"
    paper = "Lopez-Paz and Ranzato, NeurIPS 2017"
    cost = "QP, host"
    degrees = (0, 0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights of the projection."""
        return self.on_preferred(project_on_dual_cone, stats, state, mean=True), state

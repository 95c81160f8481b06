"""Gradient normalisation: every task contributes a gradient of length 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State


@dataclass(frozen=True)
class InverseGradNorm(Rule):
    """`αᵢ = 1 / sg(‖gᵢ‖)`: the update `Σ gᵢ/‖gᵢ‖` does not depend on the scale or shift of any loss.

    sg is the stop-gradient. Su, "On multi-task learning I", kexue.fm/archives/8870. With two tasks no loss
    rises to first order; with three or more a loss can rise. The norm of the update is at most n for any
    gradients, so with SGD the learning rate alone sets the size of the step.

    The weight of a task with zero gradient does not change the shared update. But it reaches the head of the
    task, whose own gradient may be nonzero (for example if the output layer is initialised at zero). Such a
    task gets the smallest weight of the other tasks, `1 / maxⱼ ‖gⱼ‖`. If all gradients are zero, the weights
    are 1.
    """

    name = "inverse_grad_norm"
    paper = "Su, kexue.fm/archives/8870"
    cost = "O(n)"
    degrees = (0, -1)
    needs = Needs.NORMS

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / ‖gᵢ‖`."""
        norms = stats.grad_norms
        longest = norms.amax()
        # αᵢ = 1 / ‖gᵢ‖
        known = torch.where(norms > 0, norms, longest)
        return known.reciprocal().masked_fill(longest == 0, 1), state

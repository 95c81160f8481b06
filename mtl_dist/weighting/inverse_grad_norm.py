"""Gradient normalisation: every task contributes a gradient of length one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State


@dataclass(frozen=True)
class InverseGradNorm(Rule):
    """`αᵢ = 1 / sg(‖gᵢ‖)`, so that the update is `Σ gᵢ/‖gᵢ‖`: blind to scale and shift of every loss.

    Su, "On multi-task learning I", kexue.fm/archives/8870. For two tasks no loss rises; from three tasks
    on it may. The update is up to n long, whatever the gradients: with SGD the learning rate sets the step.

    A task whose gradient is exactly zero moves nothing shared, whatever its weight, but the weight reaches
    its head, which may well have a gradient (an output layer initialised at zero). It gets the smallest
    weight of the others, `1 / maxⱼ ‖gⱼ‖`; where all gradients are zero the weights are 1.
    """

    needs = Needs.NORMS

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = 1 / ‖gᵢ‖`."""
        norms = stats.grad_norms
        longest = norms.amax()
        fallback = torch.where(longest > 0, longest, torch.ones_like(longest))
        # α_i = 1 / ||g_i||
        return torch.where(norms > 0, norms, fallback).reciprocal(), state

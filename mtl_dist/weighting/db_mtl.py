"""DB-MTL: log losses whose gradients are all scaled to the length of the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State


@dataclass(frozen=True)
class DBMTL(Rule):
    """`αᵢ = maxⱼ (dⱼ/Lⱼ) / dᵢ`: the update is `maxⱼ d'ⱼ · Σ ∇log Lᵢ / d'ᵢ`, `d'ᵢ = ‖∇log Lᵢ‖ = dᵢ/Lᵢ`.

    Lin et al., "Dual-balancing for multi-task learning", arXiv 2308.12029, with β = 0. The paper's moving
    average of each task gradient (β > 0) needs one copy of the gradients per task, and its direction is not a
    weighted sum of the current gradients. LibMTL adds 1e-8 to the loss and to the norm; this rule does not.

    A task with zero gradient gets the smallest weight of the other tasks, as in `InverseGradNorm`. If all
    gradients are zero, the weights are 1.
    """

    name = "db_mtl"
    paper = "Lin et al., arXiv 2308.12029"
    cost = "O(n)"
    degrees = (-1, 0)
    needs = Needs.NORMS
    positive_losses = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = maxⱼ (dⱼ/Lⱼ) / dᵢ`."""
        d = stats.grad_norms
        longest = d.amax()
        # maxⱼ d'ⱼ = maxⱼ dⱼ / Lⱼ; absent tasks have dⱼ = 0
        target = (d / stats.losses).amax()
        # αᵢ = maxⱼ d'ⱼ / dᵢ
        weights = target / torch.where(d > 0, d, longest)
        return torch.where(longest > 0, weights, torch.ones_like(weights)), state

"""DB-MTL: logarithms of the losses, and their gradients brought to the longest one's length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State


@dataclass(frozen=True)
class DBMTL(Rule):
    """`αᵢ = maxⱼ (dⱼ/Lⱼ) / dᵢ`: the update is `maxⱼ d'ⱼ · Σ ∇log Lᵢ / d'ᵢ`, `d'ᵢ = ‖∇log Lᵢ‖ = dᵢ/Lᵢ`.

    Lin et al., "Dual-balancing for multi-task learning", arXiv 2308.12029. The paper's moving average of each
    task's gradient (β > 0) needs a copy of the gradients for each task, and its direction is no weighted sum
    of present gradients: this is β = 0. The absolute 1e-8 of LibMTL, in log and norm, is left out.

    A task whose gradient is exactly zero gets the smallest weight of the others, as in `InverseGradNorm`;
    where all are zero the weights are 1.
    """

    needs = Needs.NORMS
    positive_losses = True

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = maxⱼ (dⱼ/Lⱼ) / dᵢ`."""
        d = stats.grad_norms
        longest = d.amax()
        # max_j d'_j = max_j d_j / L_j; absent tasks have d_j = 0
        target = (d / stats.losses).amax()
        # α_i = max_j d'_j / d_i
        weights = target / torch.where(d > 0, d, longest)
        return torch.where(longest > 0, weights, torch.ones_like(weights)), state

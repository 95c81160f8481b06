"""OfLogLosses: another rule, for the logarithms of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest


@dataclass(frozen=True)
class OfLogLosses(Combinator):
    """`rule` for the objectives `log Lᵢ`, whose Gram is `Gᵢⱼ/(LᵢLⱼ)`; with its weights a, `αᵢ = aᵢ/Lᵢ`.

    `Σ aᵢ∇log Lᵢ = Σ (aᵢ/Lᵢ)∇Lᵢ`: the update is exactly that of `rule` on log losses, with its guarantees, and
    blind to the unit of each loss. LOG-MGDA, LOG-CAGrad and LOG-IMTL of the official code of FAMO.

    The losses that `rule` may read stay `Lᵢ`: a logarithm has no unit and no sign that a quotient of losses
    could use.
    """

    positive_losses = True  # whatever the inner rule says

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = aᵢ/Lᵢ`."""
        losses = stats.losses
        if stats.gram is not None:
            # ⟨∇log L_i, ∇log L_j⟩ = G_ij / (L_i L_j)
            stats = replace(stats, gram=stats.gram / torch.outer(losses, losses))
        weights, inner = self.rule.update(stats, unnest("rule", state))
        # α_i = a_i / L_i
        return weights / losses, nest("rule", inner)

"""OfLogLosses: another rule, applied to the logarithms of the losses."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest


@dataclass(frozen=True)
class OfLogLosses(Combinator):
    """`αᵢ = aᵢ/Lᵢ`, where a are the weights of the inner rule for the Gram matrix `Gᵢⱼ/(LᵢLⱼ)` of `log L`.

    `Σ aᵢ∇log Lᵢ = Σ (aᵢ/Lᵢ)∇Lᵢ`: the update is exactly that of the inner rule for log losses, with all its
    guarantees. It does not depend on the unit of any loss. The official code of FAMO has LOG-MGDA, LOG-CAGrad
    and LOG-IMTL.

    The inner rule still reads the losses `Lᵢ`, not their logarithms, because rules that divide losses need
    positive values.

    Attributes:
        rule: the inner rule.
    """

    name = "of_log_losses"
    paper = "official code of FAMO"
    cost = "O(n²) + inner rule"
    positive_losses = True  # for every inner rule

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """`(a - b - 1, b)` for `(a, b)` of the inner rule: `gᵢ/Lᵢ` has degree -1 in the losses."""
        if self.rule.degrees is None:
            return None
        a, b = self.rule.degrees
        return a - b - 1, b

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = aᵢ/Lᵢ`."""
        losses = stats.losses
        if stats.gram is not None:
            # ⟨∇log Lᵢ, ∇log Lⱼ⟩ = Gᵢⱼ/(LᵢLⱼ)
            stats = replace(stats, gram=stats.gram / torch.outer(losses, losses))
        weights, inner = self.rule.update(stats, unnest("rule", state))
        # αᵢ = aᵢ/Lᵢ
        return weights / losses, nest("rule", inner)

"""KeepNorm: the weights of another rule, scaled so that the update is as long as the plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_choice

Plain = Literal["sum", "mean", "tokens"]


@dataclass(frozen=True)
class KeepNorm(Combinator):
    """`αᵢ ← s αᵢ` with `αᵀGα = pᵀGp`: the rule sets the direction, the plain weights p the length.

    Learning rate and gradient clipping were chosen for the plain update `Σ pᵢgᵢ`. With SGD, a rule whose
    weights are hundreds (`InverseGradNorm`) would train with another rate. The lengths are those at the place
    where the probe measures.

    Every step needs the Gram matrix. `Every(KeepNorm(rule), k)` measures at every k-th step. If the weights
    of the rule give an update of length 0 (within rounding), they stay as they are.

    Attributes:
        rule: the inner rule.
        like: the plain total: "sum" of the losses, `pᵢ = 1`; "mean" of the losses, `pᵢ = 1/n`; or the mean
            over all "tokens" (or samples), `pᵢ = Cᵢ / Σⱼ Cⱼ`, as language models are trained.
    """

    name = "keep_norm"
    paper = "combinator"
    cost = "O(n²) + inner rule"

    like: Plain = "sum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "like", self.like, get_args(Plain))

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # an instance's answer
        """The whole Gram matrix, for the lengths of the two updates."""
        return Needs.GRAM

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """(0, 0): the scale of the inner weights has no influence."""
        return None if self.rule.degrees is None else (0, 0)

    def needs_at(self, step: int) -> Needs:
        """The whole Gram matrix at every step."""
        return Needs.GRAM

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The weights of the inner rule, rescaled."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        # s² = pᵀGp / αᵀGα
        length, is_zero = _length(weights, stats)
        target, _ = _length(self._plain(stats), stats)
        scale = torch.where(is_zero, 1, target / torch.where(is_zero, 1, length))
        return scale * weights, nest("rule", inner)

    def _plain(self, stats: TaskStats) -> Tensor:
        if self.like == "tokens":
            total = stats.counts.sum()
            return stats.counts / torch.where(total > 0, total, 1)
        ones = torch.ones_like(stats.losses)
        return ones / stats.num_present if self.like == "mean" else ones


def _length(weights: Tensor, stats: TaskStats) -> tuple[Tensor, Tensor]:
    """`√(αᵀGα)` over the tasks present, and whether it is 0 within rounding."""
    norms = torch.where(stats.present, stats.grad_norms, 0)
    # in units of the longest term, whose square could overflow or underflow otherwise
    terms = weights * norms
    unit = terms.abs().amax()
    terms = terms / torch.where(unit > 0, unit, 1)
    divisor = torch.where(norms > 0, norms, 1)
    cosines = stats.require_gram() / divisor[:, None] / divisor
    square = terms @ cosines @ terms
    rounding = len(weights) * torch.finfo(weights.dtype).eps * terms.abs().sum().square()
    return unit * square.clamp(min=0).sqrt(), square <= rounding

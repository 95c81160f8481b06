"""Warmup: equal weights at first, then another rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_count


@dataclass(frozen=True)
class Warmup(Combinator):
    """`αᵢ = 1/n` for the first `steps` steps, then the weights of `rule`, which starts there.

    During the warm-up `rule` neither runs nor learns, and no gradient is measured; then it counts from 0. A
    rule that compares with the start of training (`InitialLoss`, `GradNorm`) compares with the end of the
    warm-up, which is often what was wanted of it.

    Attributes:
        steps: length of the warm-up; 0 is `rule` itself.
    """

    steps: int

    def __post_init__(self) -> None:
        check_count(self, "steps", self.steps, low=0)

    def needs_at(self, step: int) -> Needs:
        """Only losses during the warm-up, then what the rule reads."""
        return Needs.LOSSES if step < self.steps else self.rule.needs_at(step - self.steps)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Equal weights, or the rule's."""
        if stats.step < self.steps:
            return torch.ones_like(stats.losses) / stats.num_present, state
        weights, inner = self.rule.update(replace(stats, step=stats.step - self.steps), unnest("rule", state))
        return weights, nest("rule", inner)

"""Warmup: equal weights at first, then those of another rule."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_count


@dataclass(frozen=True)
class Warmup(Combinator):
    """`αᵢ = 1/n` for the first `steps` steps, then the weights of the inner rule.

    During the warm-up the inner rule is not updated, and no gradients are measured. After it, the inner rule
    counts its steps from 0. So a rule that compares with the start of training (`InitialLoss`, `GradNorm`)
    compares with the end of the warm-up, which is often better.

    Attributes:
        rule: the inner rule.
        steps: number of warm-up steps; 0 is the inner rule itself.
    """

    name = "warmup"
    paper = "combinator"
    cost = "inner rule, after the warm-up"

    steps: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "steps", self.steps, low=0)

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """Those of the inner rule if they are 0, as those of the equal weights are."""
        return (0, 0) if self.rule.degrees == (0, 0) else None

    def needs_at(self, step: int) -> Needs:
        """Only losses during the warm-up, then what the inner rule reads."""
        return Needs.LOSSES if step < self.steps else self.rule.needs_at(step - self.steps)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Equal weights during the warm-up, then the weights of the inner rule."""
        if stats.step < self.steps:
            return torch.ones_like(stats.losses) / stats.num_present, state
        weights, inner = self.rule.update(replace(stats, step=stats.step - self.steps), unnest("rule", state))
        return weights, nest("rule", inner)

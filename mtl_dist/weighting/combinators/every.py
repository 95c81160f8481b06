"""Every: updates another rule at every k-th step, and keeps its weights in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_count, check_other_batches
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Every(Combinator):
    """`αₜ = rule(statistics of step k⌊t/k⌋)`: gradients are measured only at every k-th step.

    The inner rule counts its own updates: its `stats.step` is `⌊t/k⌋`. A task that was absent in all updates
    so far has no weight yet. It gets the mean of the other weights, or 1/n if there are none.

    Attributes:
        rule: the inner rule.
        interval: `k`, in steps; 1 is the inner rule itself.
    """

    name = "every"
    paper = "combinator"
    cost = "inner rule, every k-th step"

    interval: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "interval", self.interval)
        check_other_batches(self, self.rule)

    def needs_at(self, step: int) -> Needs:
        """What the inner rule reads at every k-th step, only losses at the others."""
        return Needs.LOSSES if step % self.interval else self.rule.needs_at(step // self.interval)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The kept weights, whether each of them is known, and the state of the inner rule."""
        held = constant(0.0, len(tasks), device)
        known = torch.zeros(len(tasks), dtype=torch.bool, device=device)
        return {"held": held, "known": known, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """New weights at every k-th step, the kept weights at the others."""
        held, known, inner = state["held"], state["known"], unnest("rule", state)
        if stats.step % self.interval == 0:
            weights, inner = self.rule.update(replace(stats, step=stats.step // self.interval), inner)
            held = torch.where(stats.present, weights, held)
            known = known | stats.present
        mean_known = torch.where(known, held, torch.zeros_like(held)).sum() / known.sum().clamp(min=1)
        unknown = torch.where(known.any(), mean_known, 1 / stats.num_present.to(held.dtype))
        return torch.where(known, held, unknown), {"held": held, "known": known, **nest("rule", inner)}

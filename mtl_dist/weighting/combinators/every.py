"""Every: recompute another rule's weights each k-th step, hold them in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_count
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Every(Combinator):
    """`αₜ = rule(stats at step k⌊t/k⌋)`: gradients are measured at each k-th step only.

    `rule` counts its own updates: its `stats.step` is `⌊t/k⌋`. A task that was absent whenever the rule ran
    has no weight yet; it gets the mean of the weights that exist.

    Attributes:
        interval: `k`, in steps; 1 is `rule` itself.
    """

    interval: int

    def __post_init__(self) -> None:
        check_count(self, "interval", self.interval)

    def needs_at(self, step: int) -> Needs:
        """What the rule reads at the steps where it runs, else only losses."""
        return Needs.LOSSES if step % self.interval else self.rule.needs_at(step // self.interval)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The weights held, and whether each exists."""
        held = constant(0.0, len(tasks), device)
        known = torch.zeros(len(tasks), dtype=torch.bool, device=device)
        return {"held": held, "known": known, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The rule's weights at each k-th step, else those held."""
        held, known, inner = state["held"], state["known"], unnest("rule", state)
        if stats.step % self.interval == 0:
            weights, inner = self.rule.update(replace(stats, step=stats.step // self.interval), inner)
            held = torch.where(stats.present, weights, held)
            known = known | stats.present
        mean_known = torch.where(known, held, torch.zeros_like(held)).sum() / known.sum().clamp(min=1)
        unknown = torch.where(known.any(), mean_known, 1 / stats.num_present.to(held.dtype))
        return torch.where(known, held, unknown), {"held": held, "known": known, **nest("rule", inner)}

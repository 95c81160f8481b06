"""LastSeen: lets absent tasks take part with their latest statistics, for loops with one task per batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, Needs, State, nest, unnest
from mtl_dist.weighting.checks import check_other_batches
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class LastSeen(Combinator):
    """`α = rule(statistics of each task at the last step it was present in)`.

    A loop that takes its batches from several data sets in turn has one task per batch. A rule that compares
    tasks then sees one task at a time, and most rules give it the weight of equal weights. Here the inner
    rule sees all tasks that were present so far: their latest losses `Lᵢ`, norms `‖gᵢ‖`, and

        Gᵢⱼ = cᵢⱼ ‖gᵢ‖ ‖gⱼ‖

    with the cosine `cᵢⱼ` of the last step in which both tasks were present. Tasks that never met have
    `cᵢⱼ = 0`: their gradients were taken at different batches, so their angle is not known. Rules that need
    losses or norms therefore get what they need, and rules that act on conflicts see no conflict between such
    tasks. `Balancer(..., window=k)` adds the Gram matrices of k batches, with the same limit.

    Cosines of different steps may not fit together. In steps where a task is absent they are therefore
    divided by the largest row sum of their magnitudes, if that exceeds 1: G is then positive semidefinite.

    Attributes:
        rule: the inner rule.
    """

    name = "last_seen"
    paper = "combinator"
    cost = "O(n²) + inner rule"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_other_batches(self, self.rule)

    @property
    def compares(self) -> bool:  # type: ignore[override]  # an instance's answer
        """Not the tasks of one step only."""
        return False

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Nothing was seen yet."""
        n, ones = len(tasks), constant(1.0, len(tasks), device)
        latest = {
            "seen": torch.zeros(n, dtype=torch.bool, device=device),
            "losses": ones,
            "counts": ones,
            "norms": torch.zeros_like(ones),
            "cosines": torch.diag(ones),
        }
        return {**latest, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The inner rule's weights for all tasks that were present so far."""
        here = stats.present
        seen = state["seen"] | here
        losses = torch.where(here, stats.losses, state["losses"])
        counts = torch.where(here, stats.counts, state["counts"])
        norms, cosines = state["norms"], state["cosines"]
        gram: Tensor | None = None
        if stats.gram is not None and self.needs > Needs.LOSSES:
            norms = torch.where(here, stats.grad_norms, norms)
            lengths = torch.where(stats.grad_norms > 0, stats.grad_norms, 1)
            met = torch.outer(here, here) & ~torch.eye(len(here), dtype=torch.bool, device=here.device)
            if self.needs == Needs.GRAM:
                cosines = torch.where(met, stats.gram / lengths[:, None] / lengths, cosines)
            # G_ij = c_ij ‖g_i‖ ‖g_j‖
            fitting = _fitting(cosines, whole=(here == seen).all())
            gram = torch.where(torch.outer(seen, seen), fitting * norms[:, None] * norms, 0)
        latest = {"seen": seen, "losses": losses, "counts": counts, "norms": norms, "cosines": cosines}
        everyone = replace(stats, losses=losses, present=seen, gram=gram, counts=counts * seen)
        weights, inner = self.rule.update(everyone, unnest("rule", state))
        return weights, {**latest, **nest("rule", inner)}


def _fitting(cosines: Tensor, *, whole: Tensor) -> Tensor:
    """Positive semidefinite cosines; unchanged where `whole` holds, because one step gave all of them."""
    diagonal = torch.diag(cosines.diagonal())
    others = cosines - diagonal
    largest = others.abs().sum(1).amax().clamp(min=1)
    return torch.where(whole, cosines, diagonal + others / largest)

"""GO4Align: tasks in groups of similar weight, and one weight per group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_positive
from mtl_dist.weighting.helpers import constant, softmax_present


@dataclass(frozen=True)
class GO4Align(Rule):
    """`αᵢ` = mean of v over the group of i: k-means of `vᵢ = pᵢ Σⱼ Lⱼ / Lᵢ`, with `p ← norm(p exp(-ηL))`.

    Group optimization for multi-task alignment, Shen et al., NeurIPS 2024. The official code clusters the
    numbers vᵢ by Lloyd's iterations from a random start, which may end anywhere, and on every rank elsewhere.
    Optimal groups of numbers on a line are intervals. So here dynamic programming over the sorted v finds
    the groups with the least sum of squares exactly, and every rank has the same. L are the global losses.

    Attributes:
        num_groups: K; fewer where fewer tasks are present.
        lr: η, in 1/unit of the losses.
    """

    name = "go4align"
    paper = "Shen et al., NeurIPS 2024"
    cost = "O(K n²)"
    positive_losses = True

    num_groups: int = 2
    lr: float = 1e-4

    def __post_init__(self) -> None:
        check_count(self, "num_groups", self.num_groups)
        check_positive(self, "lr", self.lr)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """`log p` up to a common constant."""
        return {"log_p": constant(0.0, len(tasks), device)}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """The mean of v over each group."""
        present, losses = stats.present, stats.losses
        # p ← norm(p exp(-ηL))
        log_p = torch.where(present, state["log_p"] - self.lr * losses, state["log_p"])
        # vᵢ = pᵢ Σⱼ Lⱼ / Lᵢ
        v = softmax_present(log_p, present) * torch.where(present, losses, 0.0).sum() / losses
        return _centres(v, present, self.num_groups), {"log_p": log_p}


def _centres(values: Tensor, present: Tensor, num_groups: int) -> Tensor:
    """`[n]`, the mean of the group of each value, for the groups with the least sum of squared distances.

    Let `D(k, e)` be the least sum for the e smallest values in k groups. Then
    `D(k, e) = min_s D(k-1, s) + C(s, e)`, where C(s, e) is the sum for one group of the values s to e.
    Nothing here makes a device wait.
    """
    n = len(values)
    order = torch.where(present, values, math.inf).argsort(stable=True)
    weight = present[order].to(values.dtype)  # 0 for absent tasks, which come last
    x = values[order] * weight
    mean = x.sum() / weight.sum().clamp(min=1)
    # around their mean and in units of their spread, squares lose few digits
    centred = (x - mean) * weight
    centred = centred / torch.where(centred.abs().amax() > 0, centred.abs().amax(), 1.0)
    sums = torch.nn.functional.pad(torch.stack([weight, centred, centred**2]).cumsum(1), (1, 0))
    number, first, second = sums[:, None, :] - sums[:, :, None]  # of the values s to e, at [s, e]
    cost = (second - first**2 / number.clamp(min=1)).clamp(min=0)
    cost = cost.masked_fill(torch.ones_like(cost).tril(-1) > 0, math.inf)  # s <= e
    best, starts = cost[0], []
    for _ in range(1, num_groups):
        best, start = (best[:, None] + cost).min(0)
        starts.append(start)
    # from the last group to the first: where each begins
    end, group = torch.full_like(order[:1], n), torch.zeros_like(order)
    position = torch.arange(n, device=order.device)
    for start in reversed(starts):
        end = start.gather(0, end)
        group = group + (position >= end)
    members = (group[None] == torch.arange(num_groups, device=order.device)[:, None]) * weight
    centres = (members @ x) / members.sum(1).clamp(min=1)
    return torch.zeros_like(values).scatter(0, order, centres.gather(0, group))

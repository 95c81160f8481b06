"""KLBalance: keeps every group of latents of a hierarchical VAE in use while the KL terms are warmed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_positive
from mtl_dist.weighting.helpers import per_task


@dataclass(frozen=True)
class KLBalance(Rule):
    """`αₗ = β γₗ` for KL terms, `γₗ = rₗ / mean r`, `rₗ = (|Lₗ| + ε) / aₗ`; `α = 1` for all other losses.

    `β = min(max((t - t₀) / T, β₀), 1)` at step t. During the warm-up (β < 1), a group of latents with a small
    KL term pays less for it, so it is not switched off. A group with a large aₗ pays less too. After the
    warm-up, γ = 1. The weights are then those of the bound, and every other ratio would fit another model.

    Vahdat and Kautz, NVAE, NeurIPS 2020, section 3.2 and the official code, with ε = 0.01, `β₀ = 1e-4`, and
    for a run of N steps `T = 0.3 N`, `t₀ = 1e-4 N`. Its `a` ("square") is `4ⁱ / mᵢ`, divided by the smallest,
    for scale i = 0, 1, ... from the last one to the first in the order of the network's scales, with mᵢ
    groups. That code takes the mean of |KL| over the samples of each rank and averages only the gradients, so
    its γ differs between ranks. Here Lₗ is the global mean of the KL term, in nats per sample: all ranks have
    the γ of the whole batch.

    Attributes:
        scales: aₗ > 0 for every KL term, by task name. The tasks not named are no KL terms.
        warmup: T, in steps.
        start: t₀, in steps.
        floor: β₀, the smallest β.
        eps: ε, in nats.
    """

    name = "kl_balance"
    paper = "Vahdat and Kautz, NeurIPS 2020"
    cost = "O(n)"

    scales: Mapping[str, float]
    warmup: int
    start: int = 0
    floor: float = 1e-4
    eps: float = 0.01

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("KLBalance: scales must name at least one KL term, got none")
        check_positive(self, "scales", self.scales)
        check_count(self, "warmup", self.warmup)
        check_count(self, "start", self.start, low=0)
        check_positive(self, "floor", self.floor)
        check_positive(self, "eps", self.eps)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """Every task is a KL term; the warm-up is short, so that few steps show its end."""
        return cls({task: 1.0 + sum(task.encode()) % 3 for task in tasks}, warmup=3)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """`a`; 0 for a task that is no KL term."""
        scales = per_task(self.scales, tasks, device, "KLBalance: scales", default=0.0, partial=True)
        return {"scales": scales}

    def beta(self, step: int) -> float:
        """β at a step, in `[floor, 1]`."""
        return min(max((step - self.start) / self.warmup, self.floor), 1.0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αₗ = β γₗ` for the KL terms present, 1 for the other losses."""
        scales, beta = state["scales"], self.beta(stats.step)
        is_kl = scales > 0
        counted = is_kl & stats.present
        # rₗ = (|Lₗ| + ε) / aₗ
        ratio = torch.where(counted, (stats.losses.abs() + self.eps) / torch.where(is_kl, scales, 1.0), 0.0)
        # γₗ = rₗ / mean r over the KL terms present; 1 after the warm-up
        mean = ratio.sum() / counted.sum().clamp(min=1)
        balanced = ratio / torch.where(mean > 0, mean, 1.0)
        gamma = balanced if beta < 1 else torch.ones_like(balanced)
        return torch.where(is_kl, beta * gamma, 1.0), state

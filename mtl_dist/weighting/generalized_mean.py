"""Generalised mean: a family from the minimum over the geometric mean and the mean to the maximum."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_number
from mtl_dist.weighting.helpers import mean_present


@dataclass(frozen=True)
class GeneralizedMean(Rule):
    """Gradient of `M = ((1/n) Σ Lᵢᵖ)^(1/p)`: `αᵢ = (1/n) Lᵢᵖ⁻¹ M¹⁻ᵖ`.

    Su, "On multi-task learning I", kexue.fm/archives/8870. p = 1 is the mean. The limits are: p = 0 the
    geometric mean, p = inf the maximum, p = -inf the minimum (equal extreme losses share the weight). A
    larger p gives more weight to larger losses. If one loss is scaled, only p = 0 keeps the direction of the
    update.

    Attributes:
        power: `p`, any number, also inf or -inf.
    """

    name = "generalized_mean"
    paper = "Su, kexue.fm/archives/8870"
    cost = "O(n)"
    degrees = (0, 0)

    power: float

    positive_losses = True

    def __post_init__(self) -> None:
        check_number(self, "power", self.power, infinite=True)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """The quadratic mean."""
        return cls(2.0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = (1/n) Lᵢᵖ⁻¹ M¹⁻ᵖ = softmax(p log L)ᵢ M / Lᵢ`, with n and M over the tasks present."""
        # x = log L relative to the loss that dominates the mean, so that no power overflows
        sign = math.copysign(1.0, self.power)
        log_dominant = sign * (sign * stats.losses.log()).masked_fill(~stats.present, -math.inf).amax()
        x = torch.where(stats.present, stats.losses.log() - log_dominant, 0.0)
        if math.isinf(self.power):
            dominant = (x == 0) & stats.present
            return dominant / dominant.sum().clamp(min=1).to(x.dtype), state
        # expm1 and log1p, because 1 + px rounds to 1 for a very small p
        growth = mean_present(torch.expm1(self.power * x), stats)
        # log M = (1/p) log meanⱼ exp(pxⱼ); the limit at p = 0 is meanⱼ xⱼ
        log_mean = torch.log1p(growth) / self.power if self.power else mean_present(x, stats)
        # αᵢ = (1/n) exp(pxᵢ) / meanⱼ exp(pxⱼ) · M / Lᵢ
        weights = torch.exp(self.power * x - torch.log1p(growth) + log_mean - x) / stats.num_present
        return torch.where(stats.present, weights, torch.zeros_like(weights)), state

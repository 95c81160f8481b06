"""ReLoBRaLo: progress since the last step and since the first, with random look-back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_fraction, check_positive
from mtl_dist.weighting.helpers import constant, softmax_present, step_generator


@dataclass(frozen=True)
class ReLoBRaLo(Rule):
    """`λ(t) = a (ρ λ(t-1) + (1-ρ) λ̂(t, 0)) + (1-a) λ̂(t, t-1)`, `ρ ~ Bernoulli(β)`.

    Relative loss balancing with random look-back, `λ̂ᵢ(t, t') = n softmax(L(t) / (τ L(t')))ᵢ`. Bischof and
    Kraus, 2021. ρ is the same for all tasks and all ranks; it depends only on `seed` and the step. In
    PhysicsNeMo-Sym each rank draws its own ρ, so the ranks use different weights. In the first step all
    weights are 1.

    Attributes:
        alpha: `a` in [0, 1], decay of the moving average.
        beta: β, probability to keep the last weights instead of looking back to the first step.
        tau: temperature τ; a larger value gives more equal weights.
        seed: seed of the random numbers.
    """

    name = "relobralo"
    paper = "Bischof and Kraus, 2021"
    cost = "O(n)"
    degrees = (0, 0)
    breaks = {"no_host_wait": "its coin is tossed, and looked at, on the host: no device takes part"}

    alpha: float = 0.95
    beta: float = 0.99
    tau: float = 1.0
    seed: int = 0

    positive_losses = True

    def __post_init__(self) -> None:
        check_positive(self, "tau", self.tau)
        check_fraction(self, "alpha", self.alpha)
        check_fraction(self, "beta", self.beta)
        check_count(self, "seed", self.seed, low=0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """λ, the losses of the first and of the last step, and whether there was a last step."""
        ones = constant(1.0, len(tasks), device)
        seen = torch.zeros(len(tasks), dtype=torch.bool, device=device)
        return {"lambda": ones, "first": ones.clone(), "last": ones.clone(), "seen": seen}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """λ(t), which includes the losses of this step."""
        first = torch.where(state["seen"], state["first"], stats.losses)
        last = torch.where(state["seen"], state["last"], stats.losses)
        draw = torch.rand((), generator=step_generator(self.seed, stats.step), dtype=torch.float64)
        kept = state["lambda"] if draw < self.beta else self._progress(stats, first)
        # λ ← a (ρ λ + (1-ρ) λ̂(t, 0)) + (1-a) λ̂(t, t-1)
        blend = self.alpha * kept + (1 - self.alpha) * self._progress(stats, last)
        weights = torch.where(stats.present, blend, state["lambda"])
        return weights, {
            "lambda": weights.clone(),
            "first": torch.where(stats.present, first, state["first"]),
            "last": torch.where(stats.present, stats.losses, state["last"]),
            "seen": state["seen"] | stats.present,
        }

    def _progress(self, stats: TaskStats, reference: Tensor) -> Tensor:
        # λ̂ᵢ = n softmax(L / (τ L_ref))ᵢ
        ratio = stats.losses / (self.tau * reference)
        return stats.num_present * softmax_present(ratio, stats.present)

"""CoBa: makes validation losses converge at similar rates, with less weight for tasks that diverge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count, check_positive
from mtl_dist.weighting.helpers import constant, softmax_present


@dataclass(frozen=True)
class CoBa(Rule):
    """Convergence balancer: `α = DF · RCS + (1 - DF) · ACS`, from slopes sᵢ of `L̄ᵢ = Lᵢᵛᵃˡ(t) / Lᵢᵛᵃˡ(0)`.

    Gong et al., "CoBa: Convergence balancer for multitask finetuning of large language models", EMNLP 2024.
    sᵢ(t) is the least-squares slope of the last N values of L̄ᵢ, and s_max(t) the largest slope of any task.

    * `RCS = softmax_i(n sᵢ / Σⱼ |sⱼ|)` favours tasks that converge slowly.
    * `ACS = softmax_i(-N sᵢ / Σ_t |sᵢ(t)|)` favours tasks that still converge, relative to their own past.
    * `DF = min(N softmax_t(-τ N s_max / Σ_t |s_max(t)|), 1)` moves the weights from RCS to ACS when some task
      begins to diverge.

    Pass the validation losses to `observe` each time you measure them. The rule does not read training
    losses. DF uses the last N observations, in the paper all of them. A first loss of 0 counts as 1.
    MFTCoder's code differs from the paper: it applies a second softmax to the mixture, and a minimum weight
    of 1/(10n) (`Clamp` can do that).

    Attributes:
        warmup: all weights are 1/n until every task present has this many observations.
        window: N, in observations.
        tau: τ.
    """

    name = "coba"
    paper = "Gong et al., EMNLP 2024"
    cost = "O(n · window)"
    degrees = (0, 0)

    warmup: int = 100
    window: int = 200
    tau: float = 5.0

    observes = True

    def __post_init__(self) -> None:
        check_count(self, "warmup", self.warmup, low=2)  # a slope needs two points
        check_count(self, "window", self.window, low=2)
        check_positive(self, "tau", self.tau)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """A short window, so that few steps show all phases."""
        return cls(warmup=2, window=4)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """First validation losses, observation counts, and the last N of L̄, s and s_max (newest last)."""
        n = len(tasks)
        history = constant(0.0, self.window * n, device).reshape(self.window, n)
        return {
            "first": constant(1.0, n, device),
            "seen": constant(0.0, n, device),
            "ratios": history,
            "slopes": history.clone(),
            "worst": constant(0.0, self.window, device),
            "turns": torch.zeros((), dtype=torch.int64, device=device),
        }

    def observe(self, stats: TaskStats, state: State) -> State:
        """Adds one set of validation losses. Absent tasks are those whose loss was not measured."""
        present, seen = stats.present, state["seen"] + 1
        first = torch.where(present & (seen == 1), stats.losses, state["first"])
        ratios = _push(state["ratios"], stats.losses / torch.where(first == 0, 1.0, first.abs()))
        slopes = _push(state["slopes"], _slope(ratios, seen))
        # s_max(t) = maxᵢ sᵢ(t), from the second observation on
        sloped = present & (seen >= 2)
        largest = slopes[-1].masked_fill(~sloped, -torch.inf).amax()
        turned = sloped.any()
        worst = _push(state["worst"], torch.where(turned, largest, torch.zeros_like(largest)))
        return {
            "first": first,
            "seen": torch.where(present, seen, state["seen"]),
            "ratios": torch.where(present, ratios, state["ratios"]),
            "slopes": torch.where(present, slopes, state["slopes"]),
            "worst": torch.where(turned, worst, state["worst"]),
            "turns": state["turns"] + turned,
        }

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = DF · RCS + (1 - DF) · ACS` over the tasks present; 1/n during the warm-up of one of them."""
        present, slopes, worst = stats.present, state["slopes"], state["worst"]
        slope = torch.where(present, slopes[-1], 0.0)
        # RCS = softmax_i(n sᵢ / Σⱼ |sⱼ|)
        rcs = softmax_present(stats.num_present * _ratio(slope, slope.abs().sum()), present)
        # ACS = softmax_i(-N sᵢ / Σ_t |sᵢ(t)|), N the number of slopes so far
        count = (state["seen"] - 1).clamp(0, self.window)
        acs = softmax_present(-count * _ratio(slope, slopes.abs().sum(0)), present)
        # DF = min(N softmax_t(-τ N s_max(t) / Σ_t |s_max(t)|)_now, 1)
        turns = state["turns"].clamp(max=self.window)
        logits = -self.tau * turns * _ratio(worst, worst.abs().sum())
        recent = torch.arange(self.window, device=worst.device) >= self.window - turns
        divergence = (turns * softmax_present(logits, recent)[-1]).clamp(max=1)
        mixed = divergence * rcs + (1 - divergence) * acs
        ready = ((state["seen"] >= self.warmup) | ~present).all()
        return torch.where(ready, mixed, 1 / stats.num_present.to(mixed.dtype)), state


def _push(history: Tensor, newest: Tensor) -> Tensor:
    return torch.cat([history[1:], newest[None]])


def _ratio(value: Tensor, total: Tensor) -> Tensor:
    """`value / total`; 0 where `total` is 0, because all slopes are then 0."""
    return torch.where(total > 0, value / total, 0.0)


def _slope(history: Tensor, seen: Tensor) -> Tensor:
    """`[n]`, least-squares slope of the newest `seen` values of each column; 0 for a single value."""
    size = len(history)
    x = torch.arange(size, device=history.device)[:, None] - (size - 1)
    known = x > -seen
    count = known.sum(0)
    x_gap = torch.where(known, x - torch.where(known, x, 0).sum(0) / count, 0.0)
    # slope = Σ (x - x̄) y / Σ (x - x̄)²
    return _ratio((x_gap * history).sum(0), (x_gap * x_gap).sum(0))

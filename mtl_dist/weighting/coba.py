"""CoBa: validation losses should converge together, and not turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    With sᵢ(t) the least-squares slope of the last N values of L̄ᵢ:

    * `RCS = softmax_i(n sᵢ / Σⱼ |sⱼ|)` favours tasks that converge slowly,
    * `ACS = softmax_i(-N sᵢ / Σ_t |sᵢ(t)|)` favours tasks that still converge, against their own past,
    * `DF = min(N softmax_t(-τ N s_max / Σ_t |s_max(t)|), 1)`, s_max the largest slope of a step, passes
      from the first to the second when some task begins to diverge.

    Validation losses are handed to `observe`, as often as they are measured; training losses are not read.
    DF looks back over the same N values, where the paper keeps all. A first loss of 0 counts as 1.
    MFTCoder's code departs from the paper: it applies a second softmax to the mixture, and a least weight
    of 1/(10n) (`Clamp` does that).

    Attributes:
        warmup: observations of a task before which all weights are 1/n.
        window: N, in observations.
        tau: τ.
    """

    warmup: int = 100
    window: int = 200
    tau: float = 5.0

    observes = True

    def __post_init__(self) -> None:
        check_count(self, "warmup", self.warmup, low=2)  # a slope has two points
        check_count(self, "window", self.window, low=2)
        check_positive(self, "tau", self.tau)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """First validation loss, number of observations, and the last N of L̄, s (newest last) and s_max."""
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
        """Takes in one set of validation losses; those of absent tasks are not measured."""
        present, seen = stats.present, state["seen"] + 1
        first = torch.where(present & (seen == 1), stats.losses, state["first"])
        ratios = _push(state["ratios"], stats.losses / torch.where(first == 0, 1.0, first.abs()))
        slopes = _push(state["slopes"], _slope(ratios, seen))
        # s_max(t) = max_i s_i(t), from the second observation on
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
        """`α = DF · RCS + (1 - DF) · ACS` over the tasks present; 1/n while one of them warms up."""
        present, slopes, worst = stats.present, state["slopes"], state["worst"]
        slope = torch.where(present, slopes[-1], 0.0)
        # RCS = softmax_i(n s_i / Σ_j |s_j|)
        rcs = softmax_present(stats.num_present * _ratio(slope, slope.abs().sum()), present)
        # ACS = softmax_i(-N s_i / Σ_t |s_i(t)|), N the slopes there are
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
    """`value / total`, 0 where total is 0: all slopes are then 0."""
    return torch.where(total > 0, value / total, 0.0)


def _slope(history: Tensor, seen: Tensor) -> Tensor:
    """`[n]`, least-squares slopes of the newest `seen` values of each column, 0 where there is only one."""
    size = len(history)
    x = torch.arange(size, device=history.device)[:, None] - (size - 1)
    known = x > -seen
    count = known.sum(0)
    x_gap = torch.where(known, x - torch.where(known, x, 0).sum(0) / count, 0.0)
    # slope = Σ (x - x̄) y / Σ (x - x̄)²
    return _ratio((x_gap * history).sum(0), (x_gap * x_gap).sum(0))

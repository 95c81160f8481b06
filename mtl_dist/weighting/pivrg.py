"""PIVRG: fair progress, with more of it for the tasks whose performance is behind."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.solvers import Array, among_nonzero, fair_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_number, check_positive
from mtl_dist.weighting.helpers import constant, on_present, per_task, softmax_present


@dataclass(frozen=True)
class PIVRG(Rule):
    """`(Gα)ᵢ = √(pᵢ/αᵢ)`, `p = n softmax(s/T)`, `T = max((max s - min s) / ln b, T₀)`, from scores s.

    Performance-informed variance reduction, Qin et al., CVPR 2025: `FairGrad(2)` for `p = 1`, and the largest
    pᵢ is at most b times the smallest. sᵢ is Δmᵢ, by how many percent task i is worse than a network for this
    task alone, and negative if it is better. Tell it once per epoch: `balancer.observe` takes Δm of each task
    or, with `baselines`, its validation loss, of which it makes `Δmᵢ = 100 (Lᵢ / Lᵢ⁰ - 1)`. The losses of the
    training steps are not read. Before a task is observed, its s is 0.

    The official code starts a bounded least-squares solver at 1/n, which may stop early. Here the problem is
    solved as in `FairGrad`, for the gradients `gᵢ/pᵢ`. As there with α = 2, the update is longer if all
    gradients are shorter. A task with zero gradient gets the mean of the other weights.

    Attributes:
        baselines: L⁰ > 0, losses of networks for one task, by task name or in task order; None: `observe` is
            told Δm in percent.
        bound: b > 1.
        temperature: T₀, the smallest T, in percent.
    """

    name = "pivrg"
    paper = "Qin et al., CVPR 2025"
    cost = "O(n³) per iteration, host"
    needs = Needs.GRAM
    observes = True

    baselines: Mapping[str, float] | Sequence[float] | None = None
    bound: float = 2.0
    temperature: float = 10.0

    def __post_init__(self) -> None:
        if self.baselines is not None:
            check_positive(self, "baselines", self.baselines)
        check_number(self, "bound", self.bound)
        if self.bound <= 1:
            raise ValueError(f"PIVRG: bound must be finite and above 1, got {self.bound}")
        check_positive(self, "temperature", self.temperature)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """L⁰ and s."""
        baselines = per_task(self.baselines, tasks, device, "PIVRG: baselines")
        return {"baselines": baselines, "scores": constant(0.0, len(tasks), device)}

    def observe(self, stats: TaskStats, state: State) -> State:
        """Δm in percent, or with `baselines` the validation losses. Absent tasks keep their s."""
        scores = stats.losses if self.baselines is None else 100 * (stats.losses / state["baselines"] - 1)
        return {**state, "scores": torch.where(stats.present, scores, state["scores"])}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`(Gα)ᵢ = √(pᵢ/αᵢ)`."""
        present, scores = stats.present, state["scores"]
        high = scores.masked_fill(~present, -math.inf).amax()
        low = scores.masked_fill(~present, math.inf).amin()
        # T = max((max s - min s) / ln b, T₀), p = n softmax(s/T)
        temperature = ((high - low) / math.log(self.bound)).clamp(min=self.temperature)
        p = stats.num_present * softmax_present(scores / temperature, present)
        return on_present(among_nonzero(_solve), stats, p), state


def _solve(gram: Array, p: Array) -> Array:
    # with α = y/p the equations are those of the gradients gᵢ/pᵢ: (G'y)ᵢ = yᵢ^-½
    result: Array = fair_weights(gram / p[:, None] / p, power=0.5) / p
    return result

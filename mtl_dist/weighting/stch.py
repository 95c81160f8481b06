"""STCH: a smooth maximum of weighted distances to an ideal point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import per_task, softmax_present


@dataclass(frozen=True)
class STCH(Rule):
    """Gradient of the smooth Tchebycheff `S = μ log Σ exp(λᵢ(Lᵢ - zᵢ)/μ)`: `αᵢ = λᵢ softmax(λ(L - z)/μ)ᵢ`.

    Lin et al., ICML 2024. Every Pareto point is the minimum for some λ. LibMTL uses log(L/nadir) instead of
    L - z; its smooth maximum is `GeneralizedMean(1/μ)` of L/nadir, up to a power.

    Attributes:
        mu: μ > 0, the smoothing, in units of the losses; μ → 0 gives weight only to the largest term.
        weights: λ > 0, by task name or in task order; None is 1/n, where n is the number of tasks present.
        reference: the ideal point z, by task name or in task order; None is 0.
    """

    name = "stch"
    paper = "Lin et al., ICML 2024"
    cost = "O(n)"

    mu: float = 1.0
    weights: Mapping[str, float] | Sequence[float] | None = None
    reference: Mapping[str, float] | Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_positive(self, "mu", self.mu)
        if self.weights is not None:
            check_positive(self, "weights", self.weights)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """λ (1 if it is to be 1/n, because n is known only in the step) and z."""
        return {
            "lambda": per_task(self.weights, tasks, device, "STCH: weights", default=1.0),
            "z": per_task(self.reference, tasks, device, "STCH: reference", default=0.0),
        }

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = λᵢ softmax(λ(L - z)/μ)ᵢ`."""
        preference = state["lambda"] / stats.num_present if self.weights is None else state["lambda"]
        # αᵢ = λᵢ softmax(λ(L - z)/μ)ᵢ
        logits = preference * (stats.losses - state["z"]) / self.mu
        return preference * softmax_present(logits, stats.present), state

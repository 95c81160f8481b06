"""FAMO: all losses fall at the same relative rate, learned from losses alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.adam import Adam
from mtl_dist.weighting.base import Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_choice, check_positive
from mtl_dist.weighting.helpers import constant, per_task, softmax_present

Feedback = Literal["next", "after"]

_FLOOR = 1e-8  # of |L| + |b|: the distance to the bound that a loss at or below its bound counts with


@dataclass(frozen=True)
class FAMO(Rule):
    """Fast adaptive multitask optimization: `αᵢ = (zᵢ/Dᵢ) / Σⱼ (zⱼ/Dⱼ)`, `z = softmax(w)`, `D = L - b`.

    Liu et al., NeurIPS 2023. After the model's step w descends along `Jᵀδ`, `J = ∂z/∂w`,
    `δᵢ = log Dᵢ - log Dᵢ'`, by Adam with weight decay, D' from the losses after the step:

    * `feedback="after"`, the paper's: the same batch is evaluated again after the step, one more forward, and
      its losses are handed to `observe`.
    * `feedback="next"`: D' is the next step's. Free, and exact where the batch is the data set; with
      mini-batches δ also holds the difference between two batches, noise that Adam averages.

    The absolute 1e-8 that implementations add to D is left out: a loss of 1e-12 is an ordinary loss. Of the
    weight decays in use (1e-3 in the paper's Algorithm 2, 1e-5 and 1e-2 in its code) the paper's is the
    default.

    Attributes:
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay γ, which pulls z towards equal.
        min_losses: lower bounds b of the losses, by name or in task order; None is 0.
        feedback: where the losses after the step come from.
    """

    lr: float = 0.025
    weight_decay: float = 1e-3
    min_losses: Mapping[str, float] | Sequence[float] | None = None
    feedback: Feedback = "next"

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # with bounds of its own, it is D that must be
        """Whether losses are bounded by 0."""
        return self.min_losses is None

    @property
    def observes(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Whether the losses after the step are handed to `observe`."""
        return self.feedback == "after"

    def __post_init__(self) -> None:
        check_positive(self, "lr", self.lr)
        check_positive(self, "weight_decay", self.weight_decay, zero=True)
        check_choice(self, "feedback", self.feedback, get_args(Feedback))

    @property
    def _adam(self) -> Adam:
        return Adam(self.lr, weight_decay=self.weight_decay)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Logits, bounds, Adam's moments, and `log D` of the last step with whether there was one."""
        n = len(tasks)
        zeros = constant(0.0, n, device)
        return {
            "w": zeros,
            "b": per_task(self.min_losses, tasks, device, "FAMO: min_losses", default=0.0),
            "log_d": zeros.clone(),
            "seen": torch.zeros(n, dtype=torch.bool, device=device),
            **nest("adam", self._adam.init(n, device)),
        }

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights at these losses; with `feedback="next"`, after w has learned from them."""
        if self.feedback == "next":
            state = self._learn(stats, state)
        log_d = self._log_distance(stats, state)
        # α_i = (z_i / D_i) / Σ_j (z_j / D_j)
        weights = softmax_present(state["w"] - log_d, stats.present)
        remembered = torch.where(stats.present, log_d, state["log_d"])
        return weights, {**state, "log_d": remembered, "seen": state["seen"] | stats.present}

    def observe(self, stats: TaskStats, state: State) -> State:
        """Learns from the losses of the last step's batch, measured again after the optimizer's step."""
        if self.feedback != "after":
            return super().observe(stats, state)
        return self._learn(stats, state)

    def _learn(self, stats: TaskStats, state: State) -> State:
        active = stats.present & state["seen"]
        z = softmax_present(state["w"], active)
        # δ_i = log D_i - log D_i'
        delta = torch.where(active, state["log_d"] - self._log_distance(stats, state), 0.0)
        # J^T δ = z ⊙ (δ - <z, δ>)
        gradient = z * (delta - (z * delta).sum())
        w, adam = self._adam.step(state["w"], gradient, active, unnest("adam", state))
        return {**state, "w": w, **nest("adam", adam)}

    def _log_distance(self, stats: TaskStats, state: State) -> Tensor:
        bound = state["b"]
        floor = _FLOOR * (stats.losses.abs() + bound.abs())
        return torch.maximum(stats.losses - bound, floor).clamp(min=torch.finfo(floor.dtype).tiny).log()

"""FAMO: makes all losses fall at the same relative rate, and reads only losses."""

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

_FLOOR = 1e-8  # smallest D in units of |L| + |b|, for a loss at or below its bound


@dataclass(frozen=True)
class FAMO(Rule):
    """Fast adaptive multitask optimization: `αᵢ = (zᵢ/Dᵢ) / Σⱼ (zⱼ/Dⱼ)`, `z = softmax(w)`, `D = L - b`.

    Liu et al., NeurIPS 2023. After the optimizer's step, Adam with weight decay moves w along `-Jᵀδ`, where
    `J = ∂z/∂w`, `δᵢ = log Dᵢ - log Dᵢ'`, and D' comes from the losses after the step:

    * `feedback="after"`, as in the paper: evaluate the same batch again after the optimizer's step (one more
      forward pass) and pass its losses to `observe`.
    * `feedback="next"`: D' is the D of the next step. This costs nothing, and is exact if the batch is the
      whole data set. With mini-batches, δ also contains the difference between two batches, as noise that
      Adam averages.

    Other implementations add 1e-8 to D; this rule does not, so a loss of 1e-12 is treated as any other. The
    default weight decay is that of the paper's Algorithm 2 (1e-3); its code uses 1e-5 and 1e-2.

    Attributes:
        lr: Adam's learning rate.
        weight_decay: Adam's weight decay γ, which makes z more equal.
        min_losses: lower bounds b of the losses, by task name or in task order; None is 0.
        feedback: where the losses after the step come from.
    """

    name = "famo"
    paper = "Liu et al., NeurIPS 2023"
    cost = "O(n)"

    lr: float = 0.025
    weight_decay: float = 1e-3
    min_losses: Mapping[str, float] | Sequence[float] | None = None
    feedback: Feedback = "next"

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # with min_losses, D must be positive instead
        """Whether the lower bound of the losses is 0."""
        return self.min_losses is None

    @property
    def observes(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Whether the losses after the step must be passed to `observe`."""
        return self.feedback == "after"

    def __post_init__(self) -> None:
        check_positive(self, "lr", self.lr)
        check_positive(self, "weight_decay", self.weight_decay, zero=True)
        check_choice(self, "feedback", self.feedback, get_args(Feedback))

    @property
    def _adam(self) -> Adam:
        return Adam(self.lr, weight_decay=self.weight_decay)

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # depends on a setting
        """(0, 0); None with `min_losses`, which are in units of the losses."""
        return None if self.min_losses else (0, 0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Logits w, bounds b, state of Adam, `log D` of the last step, and whether there was a last step."""
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
        """Weights for these losses. With `feedback="next"`, w first learns from them."""
        if self.feedback == "next":
            state = self._learn(stats, state)
        log_d = self._log_distance(stats, state)
        # αᵢ = (zᵢ / Dᵢ) / Σⱼ (zⱼ / Dⱼ)
        weights = softmax_present(state["w"] - log_d, stats.present)
        remembered = torch.where(stats.present, log_d, state["log_d"])
        return weights, {**state, "log_d": remembered, "seen": state["seen"] | stats.present}

    def observe(self, stats: TaskStats, state: State) -> State:
        """Learns from the losses of the last step's batch, evaluated again after the optimizer's step."""
        if self.feedback != "after":
            return super().observe(stats, state)
        return self._learn(stats, state)

    def _learn(self, stats: TaskStats, state: State) -> State:
        active = stats.present & state["seen"]
        z = softmax_present(state["w"], active)
        # δᵢ = log Dᵢ - log Dᵢ'
        delta = torch.where(active, state["log_d"] - self._log_distance(stats, state), 0.0)
        # Jᵀδ = z ⊙ (δ - ⟨z, δ⟩)
        gradient = z * (delta - (z * delta).sum())
        w, adam = self._adam.step(state["w"], gradient, active, unnest("adam", state))
        return {**state, "w": w, **nest("adam", adam)}

    def _log_distance(self, stats: TaskStats, state: State) -> Tensor:
        bound = state["b"]
        floor = _FLOOR * (stats.losses.abs() + bound.abs())
        return torch.maximum(stats.losses - bound, floor).clamp(min=torch.finfo(floor.dtype).tiny).log()

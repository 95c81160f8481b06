"""Rules that learn one scale per task: the common part of `IMTLL` and `Uncertainty`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.adam import Adam
from mtl_dist.weighting.base import Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_number, check_positive
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class LearnedScale(Rule):
    """`αᵢ = f e^(σsᵢ)`, where the model and s together minimise `S = Σ f e^(σsᵢ) Lᵢ - fσsᵢ`.

    Adam updates s with `∂S/∂sᵢ = σ(αᵢLᵢ - f)` at the global losses, apart from the model's optimizer. At the
    minimum over s, `αᵢ = f/Lᵢ`. There is no minimum for a loss <= 0: the weight then grows without limit.

    Attributes:
        sign: σ, 1 or -1; a constant of the subclass.
        factor: f > 0; a constant of the subclass.
        lr: Adam's learning rate for s.
        start: s before the first step.
    """

    sign: ClassVar[int]
    factor: ClassVar[float]

    lr: float = 0.025
    start: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "lr", self.lr)
        check_number(self, "start", self.start)

    @property
    def _adam(self) -> Adam:
        return Adam(self.lr)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The scalars s and the state of Adam."""
        s = constant(self.start, len(tasks), device)
        return {"s": s, **nest("adam", self._adam.init(len(tasks), device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = f e^(σsᵢ)`, then one Adam step on s."""
        # αᵢ = f exp(σsᵢ)
        weights = self.factor * torch.exp(self.sign * state["s"])
        # ∂S/∂sᵢ = σ(αᵢLᵢ - f)
        gradient = self.sign * (weights * stats.losses - self.factor)
        s, adam = self._adam.step(state["s"], gradient, stats.present, unnest("adam", state))
        return weights, {"s": s, **nest("adam", adam)}

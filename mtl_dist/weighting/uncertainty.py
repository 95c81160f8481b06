"""Uncertainty: learned variances of the tasks' noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.adam import Adam
from mtl_dist.weighting.base import Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Uncertainty(Rule):
    """`αᵢ = ½e⁻ˢⁱ`, where `S = Σ ½(e⁻ˢⁱ Lᵢ + sᵢ)` is minimised over the model and over s together.

    Kendall, Gal and Cipolla, CVPR 2018, with s = log σ². The scalars are learned by Adam on their own, from
    `∂S/∂sᵢ = ½(1 - e⁻ˢⁱ Lᵢ)` at the global losses. The paper gives them to the model's optimizer; the
    Nash-MTL and FAMO repositories to Adam with rate 0.025, which is followed here. LibMTL starts from s =
    -0.5. At rest `αᵢ = 1/(2Lᵢ)`; a loss that stays negative has no rest, and its weight grows for ever.

    Attributes:
        lr: learning rate of s.
        start: s before the first step.
    """

    lr: float = 0.025
    start: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "lr", self.lr)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The scalars, and Adam's moments."""
        s = constant(self.start, len(tasks), device)
        return {"s": s, **nest("adam", Adam(self.lr).init(len(tasks), device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = ½e⁻ˢⁱ`, then one step of s."""
        # α_i = ½ exp(-s_i)
        weights = 0.5 * torch.exp(-state["s"])
        # ∂S/∂s_i = ½ - α_i L_i
        gradient = 0.5 - weights * stats.losses
        s, adam = Adam(self.lr).step(state["s"], gradient, stats.present, unnest("adam", state))
        return weights, {"s": s, **nest("adam", adam)}

"""IMTL-L: learned scales that bring all losses to one."""

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
class IMTLL(Rule):
    """`αᵢ = eˢⁱ`, where `S = Σ eˢⁱ Lᵢ - sᵢ` is minimised over the model and over s together.

    Liu et al., "Towards impartial multi-task learning", ICLR 2021. The scalars are learned by Adam on their
    own, from `∂S/∂sᵢ = eˢⁱ Lᵢ - 1` at the global losses; the paper gives them to the model's optimizer. At
    rest `αᵢ = 1/Lᵢ`. It is twice `Uncertainty` with s of the other sign.

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
        """`αᵢ = eˢⁱ`, then one step of s."""
        # α_i = exp(s_i)
        weights = torch.exp(state["s"])
        # ∂S/∂s_i = α_i L_i - 1
        gradient = weights * stats.losses - 1
        s, adam = Adam(self.lr).step(state["s"], gradient, stats.present, unnest("adam", state))
        return weights, {"s": s, **nest("adam", adam)}

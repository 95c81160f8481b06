"""GradNorm: weighted gradients of lengths that follow the tasks' training rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.adam import Adam
from mtl_dist.weighting.base import Needs, Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import constant, mean_present


@dataclass(frozen=True)
class GradNorm(Rule):
    """w minimises `Σ |wᵢdᵢ - Ḡ rᵢᵃ|`, `dᵢ = ‖gᵢ‖`, `Ḡ = meanⱼ wⱼdⱼ`, `rᵢ = (Lᵢ/Lᵢ(0)) / meanⱼ (Lⱼ/Lⱼ(0))`.

    Chen et al., ICML 2018. With the target held fixed, as in the paper, the derivative by wᵢ has the closed
    form `sign(wᵢdᵢ - Ḡrᵢᵃ) dᵢ`, because `‖∇wᵢLᵢ‖ = wᵢdᵢ`: no second backward, and nothing reaches the
    model. (Implementations that differentiate twice with `backward` leave second-order gradients in the
    model.) After each step of Adam, w is made to sum to n, as in the paper.

    dᵢ is measured where the probe measures, at the features by default; the paper takes the weights of the
    last shared layer.

    Two departures. Adam's ε is 0, so that the weights do not depend on the gradients' units. A weight that a
    step would carry below 0 stays at 0, where its derivative drives it up again.

    Attributes:
        alpha: `a`; 0 asks for equal lengths, larger values pull slow tasks harder (the paper: 0.12 to 1.5).
        lr: Adam's learning rate.
    """

    alpha: float = 1.5
    lr: float = 0.025

    needs = Needs.NORMS
    positive_losses = True

    def __post_init__(self) -> None:
        check_positive(self, "alpha", self.alpha, zero=True)
        check_positive(self, "lr", self.lr)

    @property
    def _adam(self) -> Adam:
        return Adam(self.lr, eps=0.0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Weights, first losses (0 while there is none), Adam's moments."""
        n = len(tasks)
        moments = nest("adam", self._adam.init(n, device))
        return {"w": constant(1.0, n, device), "first": constant(0.0, n, device), **moments}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = wᵢ`, then one step of w."""
        present, d = stats.present, stats.grad_norms
        first = torch.where(present & (state["first"] == 0), stats.losses, state["first"])
        w = _summing_to_n(state["w"], stats)
        # r_i = (L_i / L_i(0)) / mean_j (L_j / L_j(0))
        progress = torch.where(present, stats.losses / first, 1.0)
        r = progress / mean_present(progress, stats)
        # Ḡ = mean_j w_j d_j
        mean_norm = mean_present(w * d, stats)
        # ∂/∂w_i = sign(w_i d_i - Ḡ r_i^a) d_i
        gradient = torch.sign(w * d - mean_norm * r**self.alpha) * d
        moved, adam = self._adam.step(w, gradient, present, unnest("adam", state))
        moved = torch.where(present, _summing_to_n(moved.clamp(min=0), stats), state["w"])
        return w, {"w": moved, "first": first, **nest("adam", adam)}


def _summing_to_n(w: Tensor, stats: TaskStats) -> Tensor:
    """The weights scaled to a mean of 1 over the tasks present; 1 where all of theirs are 0."""
    mean = mean_present(w, stats)
    return torch.where(mean > 0, w / mean, 1.0)

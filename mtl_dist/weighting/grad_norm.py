"""GradNorm: makes the norms of the weighted gradients follow the training rates of the tasks."""

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

    Chen et al., ICML 2018. As in the paper, the target `Ḡrᵢᵃ` is a constant in the derivative. Then the
    derivative with respect to wᵢ is `sign(wᵢdᵢ - Ḡrᵢᵃ) dᵢ`, because `‖∇wᵢLᵢ‖ = wᵢdᵢ`. This form needs no
    second backward pass and adds no gradient to the model. (Implementations that call `backward` twice leave
    second-order gradients in the model.) After each Adam step, w is scaled to sum to n, as in the paper.

    The probe decides where dᵢ is measured: by default at the features. The paper uses the weights of the last
    shared layer.

    There are two differences from the paper. Adam's ε is 0, so that the weights do not depend on the units of
    the gradients. A weight that a step would make negative is set to 0; its derivative then increases it
    again.

    Attributes:
        alpha: `a >= 0`; 0 asks for equal norms, a larger value gives more weight to slow tasks (0.12 to 1.5
            in the paper).
        lr: Adam's learning rate.
    """

    name = "grad_norm"
    paper = "Chen et al., ICML 2018"
    cost = "O(n)"
    degrees = (0, 0)

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
        """Weights, first losses (0 if there is none yet), state of Adam."""
        n = len(tasks)
        moments = nest("adam", self._adam.init(n, device))
        return {"w": constant(1.0, n, device), "first": constant(0.0, n, device), **moments}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = wᵢ`, then one Adam step on w."""
        present, d = stats.present, stats.grad_norms
        first = torch.where(present & (state["first"] == 0), stats.losses, state["first"])
        w = _summing_to_n(state["w"], stats)
        # rᵢ = (Lᵢ / Lᵢ(0)) / meanⱼ (Lⱼ / Lⱼ(0))
        progress = torch.where(present, stats.losses / first, 1.0)
        r = progress / mean_present(progress, stats)
        # Ḡ = meanⱼ wⱼdⱼ
        mean_norm = mean_present(w * d, stats)
        # ∂/∂wᵢ = sign(wᵢdᵢ - Ḡrᵢᵃ) dᵢ
        gradient = torch.sign(w * d - mean_norm * r**self.alpha) * d
        moved, adam = self._adam.step(w, gradient, present, unnest("adam", state))
        moved = torch.where(present, _summing_to_n(moved.clamp(min=0), stats), state["w"])
        return w, {"w": moved, "first": first, **nest("adam", adam)}


def _summing_to_n(w: Tensor, stats: TaskStats) -> Tensor:
    """The weights, scaled to a mean of 1 over the tasks present; 1 if all of them are 0."""
    mean = mean_present(w, stats)
    return torch.where(mean > 0, w / mean, 1.0)

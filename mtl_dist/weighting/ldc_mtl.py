"""LDC-MTL: losses of neighbouring tasks are drawn together by learned weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.adam import Adam
from mtl_dist.weighting.base import Rule, State, nest, unnest
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import constant, softmax_present


@dataclass(frozen=True)
class LDCMTL(Rule):
    """Model and w minimise `S = Σ xᵢ + λ Σ |xᵢ - xᵢ₊₁|`, `xᵢ = σᵢτᵢLᵢ`: `αᵢ = σᵢτᵢ (1 + λ(sᵢ - sᵢ₋₁))`.

    Here `σ = softmax(w)`, `τᵢ = minⱼ Lⱼ(0) / Lᵢ(0)`, and `sᵢ = sign(xᵢ - xᵢ₊₁)`. The losses are compared with
    their neighbours in the order of the tasks, so the order is a setting. The weights sum to no constant.
    With `λ > ½`, a task whose x is smaller than those of both neighbours has a negative weight: its loss is
    raised. The balancer takes negative weights as they are; for others, use `Clamp(rule, 0.0, high)`.

    Loss discrepancy control, Xiao et al., arXiv 2502.08585, 2025. In the official code, σ comes from a layer
    on the features (softmax, or sigmoid with the detached `1/Σσ` in place of 1), which the model's optimizer
    trains; λ is 0.01 for CelebA, 0.05 for NYUv2 and QM9, 0.1 for Cityscapes. Here w is one number per task,
    which Adam moves in the state, and L are the global losses. L(0) are those of the first step of each task.

    Attributes:
        penalty: λ >= 0.
        lr: Adam's learning rate of w.
    """

    name = "ldc_mtl"
    paper = "Xiao et al., arXiv 2502.08585, 2025"
    cost = "O(n)"
    degrees = (0, 0)
    positive_losses = True
    breaks = {"permutation": "each loss is compared with the next one in the order of the tasks"}

    penalty: float = 0.01
    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_positive(self, "penalty", self.penalty, zero=True)
        check_positive(self, "lr", self.lr)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """w, L(0) (0: not seen yet), and the state of Adam."""
        zeros = constant(0.0, len(tasks), device)
        adam = Adam(self.lr).init(len(tasks), device)
        return {"w": zeros, "first": zeros.clone(), **nest("adam", adam)}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = σᵢτᵢ (1 + λ(sᵢ - sᵢ₋₁))`; then w takes a step along `-∂S/∂w`."""
        present, losses = stats.present, stats.losses
        first = torch.where(present & (state["first"] == 0), losses, state["first"])
        unit = torch.where(present, first, 1.0)
        smallest = torch.where(present, unit, unit.amax()).amin()
        sigma = softmax_present(state["w"], present)
        # y = L/L(0), in which x = min L(0) σy
        y = losses / unit
        slope = 1 + self.penalty * _sign_differences(sigma * y, present)
        # ∂S/∂w = σ ⊙ (d - ⟨σ, d⟩), dᵢ = yᵢ (1 + λ(sᵢ - sᵢ₋₁)), up to the constant min L(0)
        d = torch.where(present, y * slope, 0.0)
        gradient = sigma * (d - (sigma * d).sum())
        w, adam = Adam(self.lr).step(state["w"], gradient, present, unnest("adam", state))
        # αᵢ = σᵢτᵢ (1 + λ(sᵢ - sᵢ₋₁))
        return sigma * (smallest / unit) * slope, {"w": w, "first": first, **nest("adam", adam)}


def _sign_differences(x: Tensor, present: Tensor) -> Tensor:
    """`[n]`, `sign(xᵢ - xᵢ₊₁) - sign(xᵢ₋₁ - xᵢ)` with the neighbours among the tasks present."""
    after, before = _of_neighbour(x, present, ahead=True), _of_neighbour(x, present, ahead=False)
    return torch.sign(x - after) - torch.sign(before - x)


def _of_neighbour(x: Tensor, present: Tensor, *, ahead: bool) -> Tensor:
    """`[n]`, x of the next (or previous) task present; x itself where there is none."""
    if ahead:
        return _of_neighbour(x.flip(0), present.flip(0), ahead=False).flip(0)
    position = torch.arange(len(x), device=x.device)
    latest = torch.where(present, position, -1).cummax(0).values
    previous = torch.cat([latest.new_full((1,), -1), latest[:-1]])
    return torch.where((previous >= 0) & present, x.gather(0, previous.clamp(min=0)), x)

"""NTK balance: equal convergence rates in the tangent-kernel picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive


@dataclass(frozen=True)
class NTKBalance(Rule):
    """`αᵢ = Σⱼ κⱼ / κᵢ`, `κᵢ = ‖∇√Lᵢ‖² = ‖gᵢ‖² / (4Lᵢ)`, over the tasks present.

    Wang, Yu and Perdikaris, "When and why PINNs fail to train", J. Comput. Phys. 2022, weigh by the traces of
    the tasks' tangent kernels. For a mean of squared residuals κ is the kernel along the present residual, an
    estimate of its size that costs no per-sample gradients. PhysicsNeMo-Sym takes the same estimate without
    the square, which is `power=1`. It recomputes at each 1000th step: `Every(NTKBalance(), 1000)`.

    A task whose gradient is exactly zero counts with the largest κ, so that its weight is the smallest; where
    all are zero the weights are n.

    Attributes:
        power: 2 for the paper's kernels, 1 for their square roots.
    """

    power: float = 2.0

    needs = Needs.NORMS
    positive_losses = True

    def __post_init__(self) -> None:
        check_positive(self, "power", self.power)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = Σⱼ κⱼ / κᵢ`."""
        # √κ_i = ||g_i|| / (2 √L_i)
        root = torch.where(stats.present, stats.grad_norms / (2 * stats.losses.sqrt()), 0.0)
        largest = root.amax()
        # in units of the largest, so that no power overflows
        relative = torch.where(root > 0, root / largest, 1.0)
        kernel = relative**self.power
        # α_i = Σ_j κ_j / κ_i
        return torch.where(stats.present, kernel, 0.0).sum() / kernel, state

"""NTK balance: equal convergence rates, as estimated from neural tangent kernels."""

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

    Wang, Yu and Perdikaris, "When and why PINNs fail to train", J. Comput. Phys. 2022, use the traces of the
    tangent kernels of the tasks instead of κ. For a mean of squared residuals, κ is the kernel in the
    direction of the current residual. It estimates the size of the kernel without per-sample gradients.
    PhysicsNeMo-Sym uses √κ, which is `power=1`, and computes it every 1000 steps, which is
    `Every(NTKBalance(), 1000)`.

    A task with zero gradient counts with the largest κ, so its weight is the smallest. If all gradients are
    zero, the weights are n.

    Attributes:
        power: 2 uses κ, 1 uses √κ; any positive number is allowed.
    """

    name = "ntk_balance"
    paper = "Wang, Yu and Perdikaris, J. Comput. Phys. 2022"
    cost = "O(n)"
    degrees = (0, 0)

    power: float = 2.0

    needs = Needs.NORMS
    positive_losses = True

    def __post_init__(self) -> None:
        check_positive(self, "power", self.power)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = Σⱼ κⱼ / κᵢ`."""
        # √κᵢ = ‖gᵢ‖ / (2√Lᵢ)
        root = torch.where(stats.present, stats.grad_norms / (2 * stats.losses.sqrt()), 0.0)
        largest = root.amax()
        # relative to the largest, so that no power overflows
        relative = torch.where(root > 0, root / largest, 1.0)
        kernel = relative**self.power
        # αᵢ = Σⱼ κⱼ / κᵢ
        return torch.where(stats.present, kernel, 0.0).sum() / kernel, state

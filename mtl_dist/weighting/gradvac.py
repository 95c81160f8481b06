"""GradVac: turns gradients towards each other, up to their usual angle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.solvers import EPS, Array
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_count, check_fraction
from mtl_dist.weighting.helpers import constant, random_orders, to_host

_MAX_COSINE = 1 - 1e-8  # for a target of 1, the multiple of the other gradient would be infinite


@dataclass(frozen=True)
class GradVac(Rule):
    """Gradient vaccine: if `φ = cos(gᵢ, gⱼ)` is below its usual value ρᵢⱼ, gᵢ is turned until `φ = ρᵢⱼ`.

    For j in random order, `gᵢ ← gᵢ + ‖gᵢ‖(ρ√(1-φ²) - φ√(1-ρ²)) / (‖gⱼ‖√(1-ρ²)) gⱼ`, then
    `ρᵢⱼ ← (1-β)ρᵢⱼ + βφ`. The update is `u = Σᵢ gᵢ`. Initially ρ = 0, as in PCGrad.

    Wang et al., Gradient Vaccine, ICLR 2021, in the form for the whole model. The form per layer or per
    matrix is not a weighted sum of losses. LibMTL and TorchJD add 1e-8 to the norms, which disables the rule
    for small gradients; this rule does not. A zero gradient has no cosine, so it changes neither gᵢ nor ρ,
    and the weight of a task with zero gradient is 1. Losses can rise.

    Attributes:
        beta: β in [0, 1], rate of the moving average ρ.
        seed: seed of the random orders, which depend only on the seed and the step.
    """

    name = "gradvac"
    paper = "Wang et al., ICLR 2021"
    cost = "O(n³), host"
    degrees = (0, 0)
    breaks = {"permutation": "random orders are drawn by position, not by name"}
    needs = Needs.GRAM

    beta: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_fraction(self, "beta", self.beta)
        check_count(self, "seed", self.seed, low=0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """`ρ = 0`, `[n, n]`."""
        return {"target": constant(0.0, len(tasks) ** 2, device).reshape(len(tasks), len(tasks))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights for the orders of this step, and the moving averages of the cosines."""
        gram, target = stats.require_gram(), state["target"]
        matrix, present, (before,) = to_host(gram, stats.present, target)
        index = present.nonzero()[0]
        block, after = (index[:, None], index), before.copy()
        weights = np.zeros(len(matrix))
        weights[index], after[block] = vaccinate(
            matrix[block], after[block], random_orders(len(index), self.seed, stats.step), self.beta
        )
        targets = torch.from_numpy(after).to(target, non_blocking=True)
        return torch.from_numpy(weights).to(gram, non_blocking=True), {"target": targets}


def vaccinate(gram: Array, target: Array, orders: NDArray[np.intp], beta: float) -> tuple[Array, Array]:
    """Weights and new ρ, for all tasks i at once.

    Args:
        gram: `[n, n]`.
        target: `[n, n]`, ρ.
        orders: `[n, n]`; gᵢ is turned towards the other gradients in the order of row i.
        beta: β.
    """
    rows, lengths = np.arange(len(gram)), np.sqrt(gram.diagonal())
    target = target.copy()
    c = np.eye(len(gram))
    dots = gram.copy()  # ⟨Σₖ cᵢₖgₖ, gⱼ⟩
    squares = gram.diagonal().copy()  # ‖Σₖ cᵢₖgₖ‖²
    terms = lengths.copy()  # Σₖ |cᵢₖ| ‖gₖ‖; squares below the rounding error of its square count as zero
    for j in orders.T:
        dot, rho = dots[rows, j], target[rows, j]
        angle = (j != rows) & (lengths[j] > 0) & (squares > 8 * len(gram) * EPS * terms**2)
        length, other = np.sqrt(np.where(angle, squares, 1.0)), np.where(angle, lengths[j], 1.0)
        phi = np.clip(dot / (length * other), -1.0, 1.0)
        goal = np.clip(rho, -_MAX_COSINE, _MAX_COSINE)
        # cᵢⱼ += ‖gᵢ‖ (ρ√(1-φ²) - φ√(1-ρ²)) / (‖gⱼ‖ √(1-ρ²))
        apart = np.sqrt(1 - goal**2)
        turn = length * (goal * np.sqrt(1 - phi**2) - phi * apart) / (other * apart)
        step = np.where(angle & (phi < goal), turn, 0.0)
        c[rows, j] += step
        squares += step * (2 * dot + step * lengths[j] ** 2)
        terms += np.abs(step) * lengths[j]
        dots += step[:, None] * gram[j]
        # ρ ← (1-β)ρ + βφ
        target[rows, j] = np.where(angle, (1 - beta) * rho + beta * phi, rho)
    return c.sum(0), target

"""GradVac: gradients are turned towards each other, up to the angle they usually have."""

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

_MAX_COSINE = 1 - 1e-8  # a target of 1 could be reached by no finite multiple of the other gradient


@dataclass(frozen=True)
class GradVac(Rule):
    """Gradient vaccine: where `φ = cos(gᵢ, gⱼ)` is below its usual value ρᵢⱼ, gᵢ is turned until it is ρᵢⱼ.

    For j in random order, `gᵢ ← gᵢ + ‖gᵢ‖(ρ√(1-φ²) - φ√(1-ρ²)) / (‖gⱼ‖√(1-ρ²)) gⱼ`, then
    `ρᵢⱼ ← (1-β)ρᵢⱼ + βφ`; `u = Σᵢ gᵢ`. It starts as PCGrad, from ρ = 0.

    Wang et al., Gradient Vaccine, ICLR 2021, over the whole model; per layer or matrix the update is no
    weighted sum of losses. LibMTL and TorchJD as here, but for their 1e-8 added to norms, which switches the
    rule off for small gradients. A cosine with a zero gradient does not exist: neither gᵢ nor ρ moves, and
    the weight of a task without gradient is 1. Losses may rise.

    Attributes:
        beta: β, how fast ρ follows.
        seed: of the orders, which depend on it and on the step alone.
    """

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
        """Weights for this step's orders, and the cosines' averages."""
        gram, target = stats.require_gram(), state["target"]
        matrix, present, (before,) = to_host(gram, stats.present, target)
        index = present.nonzero()[0]
        block, after = (index[:, None], index), before.copy()
        weights = np.zeros(len(matrix))
        weights[index], after[block] = vaccinate(
            matrix[block], after[block], random_orders(len(index), self.seed, stats.step), self.beta
        )
        return torch.from_numpy(weights).to(gram), {"target": torch.from_numpy(after).to(target)}


def vaccinate(gram: Array, target: Array, orders: NDArray[np.intp], beta: float) -> tuple[Array, Array]:
    """Weights and new ρ after task i has met the tasks in the order `orders[i]`, all i at once."""
    rows, lengths = np.arange(len(gram)), np.sqrt(gram.diagonal())
    target = target.copy()
    c = np.eye(len(gram))
    dots = gram.copy()  # ⟨Σ_k c_ik g_k, g_j⟩
    squares = gram.diagonal().copy()  # ‖Σ_k c_ik g_k‖²
    terms = lengths.copy()  # Σ_k |c_ik| ‖g_k‖: squares below rounding of its square are zero
    for j in orders.T:
        dot, rho = dots[rows, j], target[rows, j]
        angle = (j != rows) & (lengths[j] > 0) & (squares > 8 * len(gram) * EPS * terms**2)
        length, other = np.sqrt(np.where(angle, squares, 1.0)), np.where(angle, lengths[j], 1.0)
        phi = np.clip(dot / (length * other), -1.0, 1.0)
        goal = np.clip(rho, -_MAX_COSINE, _MAX_COSINE)
        # c_ij += ‖g_i‖ (ρ√(1-φ²) - φ√(1-ρ²)) / (‖g_j‖ √(1-ρ²))
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

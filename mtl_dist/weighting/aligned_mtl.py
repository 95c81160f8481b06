"""Aligned-MTL: replaces the gradients by the nearest orthogonal gradients of equal length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from mtl_dist.solvers import EPS, Array, among_nonzero
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import State
from mtl_dist.weighting.checks import check_choice
from mtl_dist.weighting.preference_rule import PreferenceRule

Scale = Literal["min", "median", "rmse"]


@dataclass(frozen=True)
class AlignedMTL(PreferenceRule):
    """`α = √s VΛ^(-1/2)Vᵀw`, with the positive eigenvalues of `G = VΛVᵀ`, `s = min λ`, `w = 1/n`.

    Then `Σ αᵢgᵢ = √s Σ wᵢĝᵢ`, where the orthonormal `ĝ` are nearest to the gradients (their polar factor).
    They neither conflict nor differ in length.

    Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, Algorithm 1. LibMTL
    uses `w = 1`, the official code and TorchJD `w = 1/n`. As in these, eigenvalues below the rounding error
    of the largest one count as zero, so linearly dependent gradients are aligned within their span. This
    cut-off decides the rank, and with `scale="min"` the length of the update depends on it. A task with zero
    gradient gets the mean of the other weights.

    Attributes:
        preference: `w`; None is `1/n` over the tasks present.
        scale: s is the smallest ("min", the paper), the median ("median", the lower of two) or the mean
            ("rmse") of the positive eigenvalues.
    """

    name = "aligned_mtl"
    paper = "Senushkin et al., CVPR 2023"
    cost = "O(n³), host"
    degrees = (0, 0)

    scale: Scale = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "scale", self.scale, get_args(Scale))

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = √s VΛ^(-1/2)Vᵀw`."""
        return self.on_preferred(among_nonzero(self._solve), stats, state, mean=True), state

    def _solve(self, gram: Array, preference: Array) -> Array:
        # G = V Λ Vᵀ, without the null space
        values, vectors = np.linalg.eigh(gram)
        kept = values > len(gram) * EPS * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        # s, from eigenvalues in ascending order
        s = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[self.scale]
        # α = √s V Λ^(-1/2) Vᵀ w
        result: Array = vectors @ (np.sqrt(s / values) * (vectors.T @ preference))
        return result

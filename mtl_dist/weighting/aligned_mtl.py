"""Aligned-MTL: gradients replaced by the nearest orthogonal ones of equal length."""

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
    """`α = √s VΛ^(-1/2)Vᵀw`, with `G = VΛVᵀ` over its positive eigenvalues, `s = min λ`, `w = 1/n`.

    `Σ αᵢgᵢ = √s Σ wᵢĝᵢ` with the orthonormal `ĝ` nearest to the gradients (their polar factor): conflicts and
    differences of length are both gone.

    Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, Algorithm 1. LibMTL
    has `w = 1`, the official code and TorchJD `w = 1/n`. Eigenvalues below rounding error of the largest
    count as zero, as in all of them: with linearly dependent gradients the rule acts in their span. That is a
    decision about rank, and with `scale="min"` the length of the update depends on it. A task without
    gradient gets the mean of the others' weights.

    Attributes:
        preference: `w`; None for `1/n` over the tasks present.
        scale: s is the smallest positive eigenvalue ("min", the paper), the median ("median", the lower one
            of two) or the mean ("rmse") of them.
    """

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
        # s of the ascending eigenvalues
        s = {"min": values[0], "median": values[(len(values) - 1) // 2], "rmse": values.mean()}[self.scale]
        # α = √s V Λ^(-1/2) Vᵀ w
        result: Array = vectors @ (np.sqrt(s / values) * (vectors.T @ preference))
        return result

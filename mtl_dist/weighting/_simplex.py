"""The minimum-norm point of a convex hull, from inner products alone."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

_TOLERANCE = 1e-13  # of the rounding error in (Gα)_j, per unit of Σ_k |G_jk| α_k


def min_norm_point(gram: Tensor) -> Tensor:
    """`argmin αᵀGα` over the simplex, by Wolfe's active-set method.

    Wolfe, "Finding the nearest point in a polytope", Mathematical Programming 11, 1976. Every major step adds
    the vertex that violates optimality most, every minor step solves the problem on the affine hull of the
    active vertices and drops those that leave the simplex. It ends after finitely many steps at a point where
    `(Gα)_j >= αᵀGα` for all j, which is the optimality condition.

    Args:
        gram: `[n, n]` float64 positive semidefinite, on the CPU, any scale.

    Returns:
        `[n]` non-negative weights that sum to 1.
    """
    return torch.from_numpy(_wolfe(gram.numpy()))


def _wolfe(gram: Array) -> Array:
    n = len(gram)
    start = int(gram.diagonal().argmin())
    active = [start]
    alpha = np.zeros(n)
    alpha[start] = 1.0
    for _ in range(10 * n + 10):  # a guard: each vertex enters about once
        slope = gram @ alpha
        rounding = _TOLERANCE * (np.abs(gram) @ alpha)
        gap = slope - alpha @ slope
        entering = int((gap + rounding).argmin())
        if gap[entering] >= -rounding[entering] or entering in active:
            break
        active.append(entering)
        active = _to_affine_minimum(gram, alpha, active)
    result: Array = alpha / alpha.sum()
    return result


def _to_affine_minimum(gram: Array, alpha: Array, active: list[int]) -> list[int]:
    """Moves `alpha` (in place) to the minimum on its active face; returns the vertices still active."""
    while True:
        target = _affine_minimum(gram[np.ix_(active, active)])
        current = alpha[active]
        if (target > 0).all():
            alpha[active] = target
            return active
        # the last point on the way to the target that is still in the simplex
        leaving = target <= 0
        ratio = current[leaving] / (current[leaving] - target[leaving])
        theta = float(ratio.min(initial=1.0))
        moved = (1 - theta) * current + theta * target
        moved[np.flatnonzero(leaving)[ratio.argmin()]] = 0.0
        alpha[active] = np.clip(moved, 0.0, None)
        active = [index for index, weight in zip(active, alpha[active], strict=True) if weight > 0]


def _affine_minimum(gram: Array) -> Array:
    """`argmin yᵀGy` subject to `Σ y = 1`: y ∝ (G + s11ᵀ)⁻¹ 1, for affinely independent vertices."""
    scale = np.sqrt(gram.diagonal())
    scale = np.where(scale > 0, scale, scale.max(initial=0.0) or 1.0)
    # unit rows first, so that gradients of very different lengths keep their digits
    shifted = (gram + scale.min() ** 2) / np.outer(scale, scale)
    y = np.linalg.lstsq(shifted, 1 / scale, rcond=None)[0] / scale
    result: Array = y / y.sum()
    return result

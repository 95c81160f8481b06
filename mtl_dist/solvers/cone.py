"""Projections onto the set where every task makes progress, from inner products alone.

With gradients `g_j` as rows of J and `G = JJᵀ`, the point `d` nearest to `d₀` with `⟨g_j, d⟩ >= p_j` is
`d₀ + Jᵀx`, with `x >= 0` the multipliers of the constraints: `x = argmin ½ xᵀGx - (p - Jd₀)ᵀx`.
"""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.solvers.precision import EPS, Array


def project_on_dual_cone(gram: Array, combination: Array) -> Array:
    """`argmin vᵀGv` over `v >= u`: weights of the projection of `Jᵀu` on `{d : ⟨g_j, d⟩ >= 0 for all j}`.

    Args:
        gram: `[n, n]` positive semidefinite.
        combination: `[n]`, u, or `[n, k]`, a u in each column.

    Returns:
        Shape of `combination`.
    """
    return combination + nonnegative_minimum(gram, -gram @ combination)


def project_on_progress(gram: Array, missing: Array) -> Array | None:
    """Multipliers x of the point nearest to some start with `⟨g_j, d⟩ >= p_j`, or None where there is none.

    Least-distance programming by non-negative least squares (Lawson and Hanson, Solving Least Squares
    Problems, 1974, chapter 23): `z = argmin zᵀGz + (bᵀz - 1)²` always exists, with residual `r = 1 - bᵀz`;
    the constraints contradict each other exactly where `r = 0`, and else `x = z / r`.

    Args:
        gram: `[n, n]` positive semidefinite.
        missing: `[n]`, b, the progress `p_j` asked for less what the start makes; at most 0 for a zero
            gradient.
    """
    lengths = np.sqrt(gram.diagonal())
    lengths = np.where(lengths > 0, lengths, np.inf)
    b = missing / lengths
    scale = b.max(initial=0.0)
    if scale <= 0:
        return np.zeros_like(b)
    b = b / scale
    z = nonnegative_minimum(gram / np.outer(lengths, lengths) + np.outer(b, b), b)
    residual = 1 - b @ z
    if residual <= 32 * len(gram) * EPS * (1 + z.sum()):
        return None
    result: Array = scale * z / residual / lengths
    return result

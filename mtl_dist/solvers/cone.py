"""Projections onto the set of updates along which every task makes progress.

With the gradients `gⱼ` as rows of J and `G = JJᵀ`, the point d nearest to d₀ with `⟨gⱼ, d⟩ >= pⱼ` is
`d₀ + Jᵀx`, where `x >= 0` are the multipliers of the constraints: `x = argmin ½ xᵀGx - (p - Jd₀)ᵀx`.
"""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.solvers.precision import EPS, Array


def project_on_dual_cone(gram: Array, combination: Array) -> Array:
    """`argmin vᵀGv` over `v >= u`: weights of the projection of `Jᵀu` on `{d : ⟨gⱼ, d⟩ >= 0 for all j}`.

    Certificate: that of `nonnegative_minimum`.

    Args:
        gram: `[n, n]` positive semidefinite G.
        combination: `[n]`, u, or `[n, k]` with one u per column.

    Returns:
        v in the shape of `combination`.
    """
    return combination + nonnegative_minimum(gram, -gram @ combination)


def project_on_progress(gram: Array, missing: Array) -> Array | None:
    """Multipliers x of the point nearest to d₀ with `⟨gⱼ, d⟩ >= pⱼ`; None if there is no such point.

    Least-distance programming as non-negative least squares (Lawson and Hanson, Solving Least Squares
    Problems, 1974, chapter 23): `z = argmin zᵀGz + (bᵀz - 1)²` over `z >= 0` always exists. Its residual is
    `r = 1 - bᵀz`. The constraints contradict each other if and only if `r = 0`; otherwise `x = z / r`.

    Certificate: that of `nonnegative_minimum`.

    Args:
        gram: `[n, n]` positive semidefinite G.
        missing: `[n]`, `b = p - Jd₀`, the required progress minus the progress of d₀. It must be <= 0 for a
            zero gradient.

    Returns:
        `[n]`, x, or None.
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

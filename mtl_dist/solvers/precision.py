"""Array types and numerical constants of all solvers, and the size of their rounding errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

# float64 machine epsilon; the solvers treat small multiples of it, relative to the problem, as zero
EPS = float(np.finfo(np.float64).eps)

# relative to the diagonal, added so that no system is singular; rounding then changes x by at most about
# EPS / RIDGE
RIDGE = 1e-8


def rounding_of(x: Array, target: Array) -> Array:
    """Bound on the rounding error of `Hx - b`, for H with a unit diagonal.

    Args:
        x: `[n]`, or `[k, n]` with one x per row.
        target: the right-hand sides b, in the shape of `x`.

    Returns:
        The bounds, in the shape of `x`.
    """
    rounding: Array = 8 * target.shape[-1] * EPS * (np.abs(x).sum(-1, keepdims=True) + np.abs(target))
    return rounding

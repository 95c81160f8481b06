"""Array types and numerical constants of all solvers, and the size of their rounding errors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Bools = NDArray[np.bool_]

# float64 machine epsilon; the solvers treat small multiples of it, relative to the problem, as zero
EPS = float(np.finfo(np.float64).eps)

# added to a unit diagonal so that no system is singular; it amplifies rounding errors by at most 1 / RIDGE
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

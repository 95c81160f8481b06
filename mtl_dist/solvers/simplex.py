"""The minimum-norm point of a convex hull, or of a convex hull plus a cone, from inner products alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.solvers.precision import EPS, Array


def min_norm_weights(gram: Array, convex: NDArray[np.bool_] | None = None) -> Array:
    """`argmin yᵀGy` over `y >= 0` with `Σ y = 1` over the tasks in `convex`.

    With `a` the indicator of `convex`, the non-negative least squares problem
    `min yᵀGy + σ (aᵀy - 1)²` has the same minimiser up to its length, for every σ > 0: the constraint is
    scaled back in at the end. The optimality conditions hold up to rounding, row by row.

    Args:
        gram: `[n, n]` positive semidefinite, any scale.
        convex: `[n]`, at least one true; all where None (the simplex).

    Returns:
        `[n]` non-negative weights. Where gradients in `convex` are zero, these share the weight equally: they
        are the point of length 0, and every other choice would be arbitrary.
    """
    if len(gram) == 2 and convex is None:
        return _nearest_of_two(gram)
    a = np.ones(len(gram)) if convex is None else convex.astype(np.float64)
    lengths = np.where(a > 0, gram.diagonal(), np.inf)
    if (lengths <= 0).any():
        return (lengths <= 0) / np.count_nonzero(lengths <= 0)
    # σ of the shortest gradient's size: no digit of G is lost beside it
    sigma = lengths.min()
    y = nonnegative_minimum(gram + sigma * np.outer(a, a), sigma * a)
    result: Array = y / (a @ y)
    return result


def _nearest_of_two(gram: Array) -> Array:
    """On the segment between two gradients; gradients equal up to rounding share evenly."""
    (first, cross), (_, second) = gram.tolist()
    distance = first + second - 2 * cross
    equal = distance <= 8 * EPS * (first + second)
    # w = clip(⟨g_2, g_2 - g_1⟩ / ‖g_1 - g_2‖²)
    w = 0.5 if equal else min(max((second - cross) / distance, 0.0), 1.0)
    return np.array([w, 1 - w])

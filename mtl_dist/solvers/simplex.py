"""The minimum-norm point of the convex hull of gradients, or of a convex hull plus a cone."""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.nonnegative import nonnegative_minimum
from mtl_dist.solvers.precision import EPS, Array, Bools


def min_norm_weights(gram: Array, convex: Bools | None = None) -> Array:
    """`argmin yᵀGy` over `y >= 0` with `Σ y = 1` over the indices in `convex`.

    Let `a` be the indicator of `convex`. For every σ > 0 the non-negative least squares problem
    `min yᵀGy + σ (aᵀy - 1)²` has the same minimiser up to a factor. So this function solves that problem and
    divides the result by `aᵀy`.

    Certificate: that of `nonnegative_minimum`. Two gradients have a closed form.

    Args:
        gram: `[n, n]` positive semidefinite G, at any scale.
        convex: `[n]`, at least one entry true; None is all of them, so that y is in the simplex.

    Returns:
        `[n]` non-negative weights. If gradients in `convex` are zero, these share the weight equally: they
        are the point of length 0, and any other choice among them would be arbitrary.
    """
    if len(gram) == 2 and convex is None:
        return _nearest_of_two(gram)
    a = np.ones(len(gram)) if convex is None else convex.astype(np.float64)
    lengths = np.where(a > 0, gram.diagonal(), np.inf)
    if (lengths <= 0).any():
        return (lengths <= 0) / np.count_nonzero(lengths <= 0)
    # σ is the smallest squared length, so that adding it costs no digits of G
    sigma = lengths.min()
    y = nonnegative_minimum(gram + sigma * np.outer(a, a), sigma * a)
    result: Array = y / (a @ y)
    return result


def _nearest_of_two(gram: Array) -> Array:
    """Weights of two gradients; 0.5 each if the gradients are equal up to rounding."""
    (first, cross), (_, second) = gram.tolist()
    distance = first + second - 2 * cross
    equal = distance <= 8 * EPS * (first + second)
    # w = clip(⟨g₂, g₂ - g₁⟩ / ‖g₁ - g₂‖², 0, 1)
    w = 0.5 if equal else min(max((second - cross) / distance, 0.0), 1.0)
    return np.array([w, 1 - w])

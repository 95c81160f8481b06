"""The active-set method of Lawson and Hanson: a quadratic program with `x >= 0` and one right-hand side.

Lawson and Hanson, Solving Least Squares Problems, 1974, chapter 23.
"""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.precision import EPS, RIDGE, Array, rounding_of


def from_ridge(gram: Array, target: Array, x: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0`, for a nearly singular H.

    Args:
        gram: `[n, n]` positive semidefinite H with a unit diagonal.
        target: `[n]`, b.
        x: `[n]`, the solution with the ridge, up to rounding. It need not be feasible.
    """
    start = lawson_hanson(gram, target, np.maximum(x, 0.0), RIDGE)
    return lawson_hanson(gram, target, start, 4 * len(gram) * EPS)


def lawson_hanson(gram: Array, target: Array, start: Array, ridge: float) -> Array:
    """`argmin ½ xᵀ(H + ridge)x - bᵀx` over `x >= 0`. The objective never rises.

    Args:
        gram: `[n, n]` positive semidefinite H with a unit diagonal.
        target: `[n]`, b.
        start: `[n]`, a feasible point.
        ridge: added to the diagonal.
    """
    gram = gram + ridge * np.eye(len(start))  # makes the system regular on every support
    x = _to_minimum_on_support(gram, target, start)
    refused = np.zeros(len(x), dtype=bool)
    for _ in range(10 * len(x) + 10):  # a limit; usually each index enters once
        slope = gram @ x - target
        entering = (slope < -rounding_of(x, target)) & (x == 0) & ~refused
        if not entering.any():
            break
        j = int(np.where(entering, slope, 0.0).argmin())
        step = np.where(np.arange(len(x)) == j, EPS, x)
        moved = _to_minimum_on_support(gram, target, step)
        # an index that leaves at once depends on the others, up to rounding
        refused[j] = moved[j] == 0 or np.array_equal(moved, step)
        if not refused[j]:
            x = moved
    return x


def _to_minimum_on_support(gram: Array, target: Array, x: Array) -> Array:
    """Moves from `x` to the minimum on its support, and removes the indices that would become negative."""
    x = x.copy()
    while (free := np.flatnonzero(x)).size:
        block = gram[np.ix_(free, free)]
        goal = np.linalg.solve(block, target[free])
        if (goal > 0).all():
            x[free] = goal
            break
        # the last feasible point on the way to the goal
        leaving = goal <= 0
        ratio = x[free] / np.where(leaving, x[free] - goal, 1.0)
        last = int(np.where(leaving, ratio, np.inf).argmin())
        moved = x[free] + ratio[last] * (goal - x[free])
        moved[last] = 0.0
        x[free] = np.maximum(moved, 0.0)
    return x

"""Lawson and Hanson's active-set method, for one column of a non-negative quadratic program."""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.precision import EPS, RIDGE, Array, rounding_of


def from_ridge(gram: Array, target: Array, x: Array) -> Array:
    """The minimum for one b, from that with the ridge, where taking the ridge back changes the support."""
    start = lawson_hanson(gram, target, np.maximum(x, 0.0), RIDGE)
    return lawson_hanson(gram, target, start, 4 * len(gram) * EPS)


def lawson_hanson(gram: Array, target: Array, start: Array, ridge: float) -> Array:
    """The active-set method, from a feasible `start`: one column, never worse than it was."""
    gram = gram + ridge * np.eye(len(start))  # no support is singular
    x = _to_minimum_on_support(gram, target, start)
    refused = np.zeros(len(x), dtype=bool)
    for _ in range(10 * len(x) + 10):  # a guard: each index enters about once
        slope = gram @ x - target
        entering = (slope < -rounding_of(x, target)) & (x == 0) & ~refused
        if not entering.any():
            break
        j = int(np.where(entering, slope, 0.0).argmin())
        step = np.where(np.arange(len(x)) == j, EPS, x)
        moved = _to_minimum_on_support(gram, target, step)
        # an index that leaves at once depends on the others up to rounding
        refused[j] = moved[j] == 0 or np.array_equal(moved, step)
        if not refused[j]:
            x = moved
    return x


def _to_minimum_on_support(gram: Array, target: Array, x: Array) -> Array:
    """From `x` to the minimum on its support, dropping on the way what would turn negative."""
    x = x.copy()
    while (free := np.flatnonzero(x)).size:
        block = gram[np.ix_(free, free)]
        goal = np.linalg.solve(block, target[free])
        if (goal > 0).all():
            x[free] = goal
            break
        # the last point on the way to the goal that is still feasible
        leaving = goal <= 0
        ratio = x[free] / np.where(leaving, x[free] - goal, 1.0)
        last = int(np.where(leaving, ratio, np.inf).argmin())
        moved = x[free] + ratio[last] * (goal - x[free])
        moved[last] = 0.0
        x[free] = np.maximum(moved, 0.0)
    return x

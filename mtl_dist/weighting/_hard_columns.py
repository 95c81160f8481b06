"""What pivoting of non-negative quadratic programs needs where the matrix is nearly singular."""

from __future__ import annotations

import numpy as np

from mtl_dist.weighting._base import EPS, Array


def rounding_of(x: Array, target: Array) -> Array:
    """Rounding error of `Hx - b`, row by row, for H with a unit diagonal."""
    rounding: Array = 8 * target.shape[-1] * EPS * (np.abs(x).sum(-1, keepdims=True) + np.abs(target))
    return rounding


def line_search(start: tuple[Array, Array], end: tuple[Array, Array], ridge: float) -> tuple[Array, Array]:
    """The point between `start` and `end`, both (x, Hx - b), where `½ xᵀHx + ‖min(z, 0)‖² / 2ρ` is least."""
    (x, z), dx, dz = start, end[0] - start[0], end[1] - start[1]
    # the derivative is linear between the points where an entry of z changes its sign
    at = np.where(z * end[1] < 0, -z / np.where(dz == 0, 1.0, dz), 1.0)
    order = at.argsort(axis=1)
    at = np.take_along_axis(at, order, 1)
    turns = np.where(z * end[1] < 0, np.where(dz < 0, 1.0, -1.0), 0.0)

    def pieces(whole: Array, parts: Array) -> Array:
        first = whole.sum(1, keepdims=True) + (parts * (z < 0)).sum(1, keepdims=True) / ridge
        later = np.take_along_axis(parts * turns, order, 1).cumsum(1) / ridge
        return np.concatenate([first, first + later], axis=1)

    constant, linear = pieces(x * dz, z * dz), pieces(dx * dz, dz * dz)
    ends = np.concatenate([at, np.ones_like(at[:, :1])], axis=1)
    piece = (constant + linear * ends >= 0).argmax(1)[:, None]
    root = -np.take_along_axis(constant, piece, 1) / np.take_along_axis(linear, piece, 1)
    falls = (constant[:, -1:] + linear[:, -1:]) <= 0
    part = np.where(falls, 1.0, root)
    # the end as it was given, where it is reached: z has no digits left to lose
    return np.where(falls, end[0], x + part * dx), np.where(falls, end[1], z + part * dz)


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

"""Convex quadratic programs over the non-negative orthant, from inner products alone.

Minimum-norm points, projections onto dual cones and non-negative least squares of gradients are all of this
one form, so they share this one solver.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtl_dist.solvers.active_set import from_ridge
from mtl_dist.solvers.one_column import REFINEMENTS, minimum, support_of, with_ridge
from mtl_dist.solvers.pivoting import SMALL, Support, pivot
from mtl_dist.solvers.precision import Array, Bools, rounding_of
from mtl_dist.solvers.walk import Transform

Solve = Callable[[Array], Array]

_NARROW = 0.1  # slopes at the minimum for the mean, beside those at 0


def nonnegative_minimum(gram: Array, target: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0`, for each column b of `target`.

    The answer meets the optimality conditions `Hx - b >= 0`, `x ⟂ Hx - b` up to rounding, measured in units
    of each row's own length, so that gradients of very different lengths keep their digits. Where several x
    do, it is the shortest in those units, up to a small relative error: rounding and the order of the rows do
    not decide. For H with a small ridge the support is found exactly, by walking to it; for many columns that
    have little in common, principal pivoting of all of them at once is tried first. Then the ridge's effect
    is taken back on that support. Where that would change the support, because H is nearly singular, Lawson
    and Hanson's method ends without the ridge.

    Args:
        gram: `[n, n]` positive semidefinite H. A row of zeros leaves its `x` at 0.
        target: `[n]` or `[n, k]`, with `bᵀz <= 0` for every `z >= 0` in the null space of H, or the minimum
            does not exist and the answer is finite but arbitrary.

    Returns:
        `[n]` or `[n, k]`.
    """
    n = len(gram)
    lengths = np.sqrt(gram.diagonal())
    lengths = np.where(lengths > 0, lengths, np.inf)
    unit = gram / np.outer(lengths, lengths)
    unit.flat[:: n + 1] = 1.0
    columns = (target.T / lengths).reshape(-1, n)
    result = np.zeros_like(columns)
    is_open = (columns > 0).any(1)  # elsewhere x = 0 is optimal
    if is_open.any():
        one = len(columns) == 1
        result[is_open] = minimum(unit, columns[0]) if one else _all(unit, columns[is_open])
    scaled: Array = (result / lengths).T.reshape(target.shape)
    return scaled


def _all(unit: Array, columns: Array) -> Array:
    ridged, scaled = with_ridge(unit), columns / np.abs(columns).max(1, keepdims=True)
    result, todo = np.zeros_like(columns), np.arange(len(columns))
    base, start, is_narrow = np.zeros(len(unit), dtype=bool), np.ones(len(unit)), False
    if ridged.size * len(columns) > SMALL and ((mean := scaled.mean(0)) > 0).any():
        base = support_of(ridged, mean)
        start = np.maximum(Transform(ridged, base).offset(mean), 0.0)
        # in a narrow cone all projections are alike, and pivoting does not end
        is_narrow = start[~base].max(initial=0.0) <= _NARROW * np.abs(mean).max()
    if not is_narrow:
        free, inverse, ended = pivot(ridged, columns)
        if ended.any():
            free, target = free[ended], columns[ended]
            result[ended] = _minima(unit, ridged, free, target, Support(ridged, free, inverse).solve)
        todo = todo[~ended]
    if len(todo):
        transform = Transform(ridged, base)
        free = transform.walks(start, transform.offset(scaled[todo]))
        result[todo] = _minima(unit, ridged, free, columns[todo], lambda b: transform.solve(free, b))
    return result


def _minima(unit: Array, ridged: Array, free: Bools, target: Array, solve: Solve | None = None) -> Array:
    """The minima whose supports with the ridge are `free`; `solve` is for these a cheaper `H_FF⁻¹ b`."""
    x, optimal = _without_ridge(unit, solve or Support(ridged, free).solve, free, target)
    rest = np.flatnonzero(~optimal)
    if len(rest) and solve:
        x[rest] = _minima(unit, ridged, free[rest], target[rest])
        return x
    for row in rest:
        x[row] = from_ridge(unit, target[row], x[row])
    return x


def _without_ridge(unit: Array, solve: Solve, free: Bools, target: Array) -> tuple[Array, Bools]:
    """The minima with the ridge taken back, or with it where that changes the support; and where not."""
    x = exact = solve(target)
    for _ in range(REFINEMENTS):
        exact = exact + solve(target - exact @ unit)
    slope = exact @ unit - target
    error = np.where(free, np.abs(slope), -slope) - rounding_of(exact, target)
    optimal: Bools = np.logical_and.reduce((exact >= 0) & (error <= 0), axis=1)
    return np.where(optimal[:, None], exact, x), optimal

"""Convex quadratic programs with `x >= 0`, in the Gram matrix of the gradients.

Minimum-norm points, projections onto dual cones and non-negative least squares of gradients all have this
form, so they share this solver.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtl_dist.solvers.active_set import from_ridge
from mtl_dist.solvers.pivoting import SMALL, Support, pivot
from mtl_dist.solvers.precision import RIDGE, Array, Bools, rounding_of
from mtl_dist.solvers.walk import Transform

Solve = Callable[[Array], Array]

_REFINEMENTS = 2  # each one reduces the effect of the ridge by the factor RIDGE / smallest eigenvalue
_ROUNDS = 8  # of pivoting; well-conditioned problems take 2 to 7, others may cycle
# a cone is narrow if the largest slope at the minimum for the mean right-hand side is at most this part of
# the largest slope at 0
_NARROW = 0.1


def nonnegative_minimum(gram: Array, target: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0`, for each column b of `target`.

    Certificate: the optimality conditions `Hx - b >= 0`, `x ⟂ Hx - b` hold up to rounding. The error of each
    row is relative to the length of its gradient, so that short gradients keep their digits beside long ones.
    If several x are optimal, the result is the one of minimum norm in these units, up to a small relative
    error: neither rounding nor the order of the rows decides.

    Method:

    1. Add a small ridge to H, and find the support of the minimum (the indices with `x > 0`): by principal
       pivoting (Júdice and Pires, Computers & Operations Research 21, 1994), and if that does not end, by
       following the solution from another right-hand side (`walk.Transform`).
    2. Remove the effect of the ridge on this support by iterative refinement.
    3. If the conditions then fail, because H is nearly singular, continue without the ridge by the
       active-set method of Lawson and Hanson (`active_set`).

    Args:
        gram: `[n, n]` positive semidefinite H. `x` is 0 where H has a row of zeros.
        target: `[n]` or `[n, k]`, with `bᵀz <= 0` for every `z >= 0` in the null space of H. Otherwise there
            is no minimum, and the result is finite but arbitrary.

    Returns:
        x in the shape of `target`.
    """
    n = len(gram)
    lengths = np.sqrt(gram.diagonal())
    lengths = np.where(lengths > 0, lengths, np.inf)
    unit = gram / np.outer(lengths, lengths)
    unit.flat[:: n + 1] = 1.0
    columns = (target.T / lengths).reshape(-1, n)
    result = np.zeros_like(columns)
    is_open = (columns > 0).any(1)  # if no entry of b is positive, x = 0 is optimal
    if is_open.any():
        one = len(columns) == 1
        result[is_open] = _one(unit, columns[0]) if one else _many(unit, columns[is_open])
    scaled: Array = (result / lengths).T.reshape(target.shape)
    return scaled


def with_ridge(unit: Array) -> Array:
    """`H + ρ1` with the ridge ρ."""
    ridged = unit.copy()
    ridged.flat[:: len(unit) + 1] += RIDGE
    return ridged


def support_of(ridged: Array, target: Array) -> Bools:
    """Support of the minimum for one b, `[n]`: by principal pivoting, or if that does not end, by a walk."""
    free = target > 0
    for _ in range(_ROUNDS):
        rows = free.nonzero()[0]
        x = np.zeros_like(target)
        x[rows] = _solve(ridged[rows[:, None], rows], target[rows])
        pivoted: Bools = np.where(free, x > 0, ridged @ x - target < -rounding_of(x, target))
        if np.array_equal(pivoted, free):
            return free
        free = pivoted
    transform = Transform(ridged, free)
    q = transform.offset(target)
    return transform.walk(transform.start(q), q)


def _one(unit: Array, target: Array) -> Array:
    """The minimum for H with a unit diagonal and one b, `[n]`, that has a positive entry."""
    ridged = with_ridge(unit)
    free = support_of(ridged, target)
    rows = free.nonzero()[0]
    block, x = ridged[rows[:, None], rows], np.zeros_like(target)
    x[rows] = _solve(block, target[rows])
    exact = x.copy()
    for _ in range(_REFINEMENTS):
        exact[rows] += _solve(block, (target - unit @ exact)[rows])
    slope = unit @ exact - target
    error = np.where(free, np.abs(slope), -slope) - rounding_of(exact, target)
    if exact.min() >= 0 and error.max() <= 0:
        return exact
    return from_ridge(unit, target, x)


def _solve(block: Array, target: Array) -> Array:
    x = np.divide(target, block[0]) if len(block) == 1 else np.linalg.solve(block, target)
    return x.astype(np.float64, copy=False)


def _many(unit: Array, columns: Array) -> Array:
    """The minima for H with a unit diagonal and each row b of `columns`, `[k, n]`."""
    ridged, scaled = with_ridge(unit), columns / np.abs(columns).max(1, keepdims=True)
    result, todo = np.zeros_like(columns), np.arange(len(columns))
    base, start, is_narrow = np.zeros(len(unit), dtype=bool), np.ones(len(unit)), False
    if ridged.size * len(columns) > SMALL and ((mean := scaled.mean(0)) > 0).any():
        base = support_of(ridged, mean)
        start = np.maximum(Transform(ridged, base).offset(mean), 0.0)
        # in a narrow cone all projections are similar, and pivoting does not end
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
    """The minima whose supports with the ridge are `free`.

    `solve` computes `H_FF⁻¹ b` for these supports, faster but less accurately than a factorisation of each
    block. Rows that it leaves inaccurate are solved again by such factorisations.
    """
    x, optimal = _without_ridge(unit, solve or Support(ridged, free).solve, free, target)
    rest = np.flatnonzero(~optimal)
    if len(rest) and solve:
        x[rest] = _minima(unit, ridged, free[rest], target[rest])
        return x
    for row in rest:
        x[row] = from_ridge(unit, target[row], x[row])
    return x


def _without_ridge(unit: Array, solve: Solve, free: Bools, target: Array) -> tuple[Array, Bools]:
    """The minima without the ridge on the supports `free`, and for each row whether it is optimal.

    Rows that are not optimal are returned with the ridge, as a start for `from_ridge`.
    """
    x = exact = solve(target)
    for _ in range(_REFINEMENTS):
        exact = exact + solve(target - exact @ unit)
    slope = exact @ unit - target
    error = np.where(free, np.abs(slope), -slope) - rounding_of(exact, target)
    optimal: Bools = np.logical_and.reduce((exact >= 0) & (error <= 0), axis=1)
    return np.where(optimal[:, None], exact, x), optimal

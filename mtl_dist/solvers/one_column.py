"""The non-negative quadratic program with one right-hand side."""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.active_set import from_ridge
from mtl_dist.solvers.precision import EPS, RIDGE, Array, Bools
from mtl_dist.solvers.walk import Transform

REFINEMENTS = 2  # each takes back the effect of the ridge by a factor of ridge / smallest eigenvalue
_ROUNDS = 8  # of pivoting; 2 to 7 are enough where the matrix is well conditioned, elsewhere it may cycle


def with_ridge(unit: Array) -> Array:
    """`H + ρ1`."""
    ridged = unit.copy()
    ridged.flat[:: len(unit) + 1] += RIDGE
    return ridged


def minimum(unit: Array, target: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0` for H with a unit diagonal and one b, `[n]`, not all of it <= 0."""
    ridged = with_ridge(unit)
    free = support_of(ridged, target)
    rows = free.nonzero()[0]
    block, x = ridged[rows[:, None], rows], np.zeros_like(target)
    x[rows] = _solve(block, target[rows])
    exact = x.copy()
    for _ in range(REFINEMENTS):
        exact[rows] += _solve(block, (target - unit @ exact)[rows])
    slope = unit @ exact - target
    error = np.where(free, np.abs(slope), -slope) - _rounding(exact, target)
    if exact.min() >= 0 and error.max() <= 0:
        return exact
    return from_ridge(unit, target, x)


def support_of(ridged: Array, target: Array) -> Bools:
    """Support of the minimum, by principal pivoting where that ends, else by a walk from where it stopped."""
    free = target > 0
    for _ in range(_ROUNDS):
        rows = free.nonzero()[0]
        x = np.zeros_like(target)
        x[rows] = _solve(ridged[rows[:, None], rows], target[rows])
        pivoted: Bools = np.where(free, x > 0, ridged @ x - target < -_rounding(x, target))
        if np.array_equal(pivoted, free):
            return free
        free = pivoted
    transform = Transform(ridged, free)
    q = transform.offset(target)
    return transform.walk(transform.start(q), q)


def _solve(block: Array, target: Array) -> Array:
    x = np.divide(target, block[0]) if len(block) == 1 else np.linalg.solve(block, target)
    return x.astype(np.float64, copy=False)


def _rounding(x: Array, target: Array) -> Array:
    """As `rounding_of`, for one row."""
    rounding: Array = 8 * len(x) * EPS * (float(np.abs(x).sum()) + np.abs(target))
    return rounding

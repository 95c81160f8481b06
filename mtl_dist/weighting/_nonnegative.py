"""Convex quadratic programs over the non-negative orthant, from inner products alone.

Minimum-norm points, projections onto dual cones and non-negative least squares of gradients are all of this
one form, so they share this one solver.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtl_dist.weighting._base import EPS, Array
from mtl_dist.weighting._hard_columns import lawson_hanson, line_search, rounding_of
from mtl_dist.weighting._supports import SMALL, Support

RIDGE = 1e-8  # relative to the diagonal; rounding moves x by about EPS / ridge, and not more
_REFINEMENTS = 2  # each takes back the effect of the ridge by a factor of ridge / smallest eigenvalue
_FREE_ROUNDS = 4  # of pivoting, enough where the matrix is well conditioned; damped afterwards
_ROUNDS = 60  # a guard; what is left then is for the active-set method


def nonnegative_minimum(gram: Array, target: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0`, for each column b of `target`.

    The answer meets the optimality conditions `Hx - b >= 0`, `x ⟂ Hx - b` up to rounding, measured in units
    of each row's own length, so that gradients of very different lengths keep their digits. Where several x
    do, it is the shortest in those units, up to a small relative error: rounding and the order of the rows do
    not decide. Coordinate descent guesses the support of many columns, principal pivoting of all columns at
    once makes it exact, for H with a small ridge. What it leaves, because H is nearly singular, Lawson and
    Hanson's method ends, first with that ridge, and without it where taking it back changes the support.

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
    many = len(columns) > 1 and unit.size * len(columns) > SMALL
    result = _descend(unit, columns) if many else np.maximum(columns, 0.0)
    open_columns = np.flatnonzero((columns > 0).any(1))  # elsewhere x = 0 is optimal
    hard = _pivot(unit, columns, result, open_columns)
    for column in hard:
        result[column] = lawson_hanson(unit, columns[column], result[column], RIDGE)
    for column in _pivot(unit, columns, result, hard):
        result[column] = lawson_hanson(unit, columns[column], result[column], 4 * n * EPS)
    scaled: Array = (result / lengths).T.reshape(target.shape)
    return scaled


def _descend(gram: Array, target: Array) -> Array:
    """A few sweeps of coordinate descent from 0, `[k, n]`."""
    x = np.zeros_like(target.T)
    for _ in range(3 + len(target) // 16):  # a sweep costs as much for one column as for many
        for j, row in enumerate(gram):
            x[j] = np.maximum(0.0, x[j] + target[:, j] - row @ x)
    return np.ascontiguousarray(x.T)


def _pivot(gram: Array, target: Array, result: Array, todo: NDArray[np.intp]) -> NDArray[np.intp]:
    """Makes the columns `todo` of `result` exact, starting from their supports; those it could not settle.

    With a ridge ρ the problem is that of z = Hx - b, unconstrained: minimise `½ xᵀHx + ‖min(z, 0)‖² / 2ρ`.
    Pivoting is Newton's method there (Júdice and Pires, Computers & Operations Research 21, 1994), which may
    cycle; from some round on no step goes beyond the minimum along it, and then it ends (Mangasarian,
    Optimization Methods and Software 17, 2002). The ridge's effect is taken back on that support at the end.
    """
    if not len(todo):
        return todo
    unsettled, before = [todo[:0]], (target[:0], target[:0])
    ridged = gram.copy()
    ridged.flat[:: len(gram) + 1] += RIDGE
    is_read = len(todo) > 1 and ridged.size * len(todo) > SMALL
    inverse: Array = np.linalg.inv(ridged).astype(np.float64, copy=False) if is_read else ridged
    free = result[todo] > 0
    for rounds in range(_ROUNDS):
        damped = rounds >= _FREE_ROUNDS
        b = target[todo]
        support = Support(ridged, inverse, free, direct=damped)
        x = support.solve(b)
        gradient = x @ gram - b
        z = np.where(free, -RIDGE * x, gradient)
        # free where x stays positive, or where the bound's multiplier is negative
        rounding = np.where(free, 0.0, rounding_of(x, b))
        pivoted = z < -rounding
        found = (pivoted == free).all(1)
        if found.any():
            exact = x - support.solve(gradient)
            for _ in range(_REFINEMENTS - 1):
                exact += support.solve(b - exact @ gram)
            slope = exact @ gram - b
            error = np.where(free, np.abs(slope), -slope) - rounding_of(exact, b)
            optimal = found & (exact >= 0).all(1) & (error <= 0).all(1)
            result[todo] = np.where(optimal[:, None], exact, x)  # x of the others is overwritten later
            unsettled.append(todo[found & ~optimal])
            if found.all():
                return np.concatenate(unsettled)
        if damped:
            x, z = line_search(before, (x, z), RIDGE)
            pivoted = z < -rounding
        todo, free, before = todo[~found], pivoted[~found], (x[~found], z[~found])
    result[todo] = np.maximum(before[0], 0.0)
    return np.concatenate([*unsettled, todo])

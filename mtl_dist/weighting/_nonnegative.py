"""Convex quadratic programs over the non-negative orthant, from inner products alone.

Minimum-norm points, projections onto dual cones and non-negative least squares of gradients are all of this
one form, so they share this one solver.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_dist.weighting._base import EPS, Array
from mtl_dist.weighting._hard_columns import interior_point, lawson_hanson, rounding_of

RIDGE = 1e-8  # relative to the diagonal; rounding moves x by about EPS / ridge, and not more
_REFINEMENTS = 2  # each takes back the effect of the ridge by a factor of ridge / smallest eigenvalue
_SMALL = 8192  # numbers in all blocks; up to here a guess costs more than the pivots that it saves
_ROUNDS = 8  # of pivoting, which ends in 1 to 5 where the matrix is well conditioned


def nonnegative_minimum(gram: Array, target: Array) -> Array:
    """`argmin ½ xᵀHx - bᵀx` over `x >= 0`, for each column b of `target`.

    The answer meets the optimality conditions `Hx - b >= 0`, `x ⟂ Hx - b` up to rounding, measured in units
    of each row's own length, so that gradients of very different lengths keep their digits. Where several x
    do, it is the shortest in those units, up to a small relative error: rounding and the order of the rows do
    not decide. Coordinate descent guesses the support, principal pivoting of all columns at once makes it
    exact. Columns where that cycles, because H is nearly singular, get their support from an interior-point
    method, or, where no digits are left to tell, from Lawson and Hanson's method, which always ends.

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
    np.fill_diagonal(unit, 1.0)
    columns = (target.T / lengths).reshape(-1, n)
    result = _descend(unit, columns) if unit.size * len(columns) > _SMALL else np.maximum(columns, 0.0)
    open_columns = np.flatnonzero((columns > 0).any(1))  # elsewhere x = 0 is optimal
    hard = _pivot(unit, columns, result, open_columns, RIDGE)
    for ridge in (RIDGE, 4 * n * EPS):
        for column in hard:
            result[column] = interior_point(unit, columns[column], ridge)
        hard = _pivot(unit, columns, result, hard, ridge)
    for column in hard:
        result[column] = lawson_hanson(unit, columns[column], result[column])
    scaled: Array = (result / lengths).T.reshape(target.shape)
    return scaled


def _descend(gram: Array, target: Array) -> Array:
    """A few sweeps of coordinate descent from 0, `[k, n]`."""
    x = np.zeros_like(target.T)
    for _ in range(3 + len(target) // 16):  # a sweep costs as much for one column as for many
        for j, row in enumerate(gram):
            x[j] = np.maximum(0.0, x[j] + target[:, j] - row @ x)
    return np.ascontiguousarray(x.T)


def _pivot(
    gram: Array, target: Array, result: Array, todo: NDArray[np.intp], ridge: float
) -> NDArray[np.intp]:
    """Makes the columns `todo` of `result` exact, starting from their supports; those it could not settle.

    Júdice and Pires, Computers & Operations Research 21, 1994. The ridge makes the support unique. Its effect
    on x is taken back, on that support, at the end.
    """
    unsettled = [todo[:0]]
    ridged: Array = gram + ridge * np.eye(len(gram))
    inverse = np.linalg.inv(ridged).astype(np.float64, copy=False)
    free = result[todo] > 0
    for _ in range(_ROUNDS):
        if not len(todo):
            break
        b = target[todo]
        support = _Support(ridged, inverse, free)
        x = support.solve(b)
        slope = x @ gram + ridge * x - b
        # free where x stays positive, or where the bound's multiplier is negative
        pivoted = np.where(free, x > 0, slope < -rounding_of(x, b))
        found = (pivoted == free).all(1)
        if found.any():
            for _ in range(_REFINEMENTS):
                x += support.solve(b - x @ gram)
            slope = x @ gram - b
            error = np.where(free, np.abs(slope), -slope) - rounding_of(x, b)
            optimal = found & (x >= 0).all(1) & (error <= 0).all(1)
            result[todo[optimal]] = x[optimal]
            unsettled.append(todo[found & ~optimal])
        todo, free = todo[~found], pivoted[~found]
    return np.concatenate([*unsettled, todo])


class _Support:
    """`H_FF + ridge` of many supports F at once, factorised; `ridged` is H + ridge, `inverse` its inverse."""

    def __init__(self, ridged: Array, inverse: Array, free: NDArray[np.bool_]) -> None:
        self._free, self._inverse = free, inverse
        self._small = ridged.size * len(free) <= _SMALL
        if self._small:
            blocks = np.where(free[:, :, None] & free[:, None, :], ridged, np.eye(len(ridged)))
            self._inverses = np.linalg.inv(blocks)
            return
        # whichever is smaller: the rows that are free, or those at their bound
        self._direct = free.sum(1).max() <= (~free).sum(1).max()
        matrix, rows = (ridged, free) if self._direct else (inverse, ~free)
        # these rows first, padded with the identity to the largest number of them
        size = int(rows.sum(1).max())
        self._order = np.argsort(~rows, axis=1, kind="stable")[:, :size]
        self._inside = np.take_along_axis(rows, self._order, 1)
        blocks = np.take(matrix, self._order[:, :, None] * len(matrix) + self._order[:, None, :])
        blocks *= self._inside[:, :, None] & self._inside[:, None, :]
        blocks[:, np.arange(size), np.arange(size)] += ~self._inside
        self._factors = torch.linalg.lu_factor(torch.from_numpy(blocks))

    def solve(self, target: Array) -> Array:
        """`x_F = (H_FF + ridge)⁻¹ b_F`, `x = 0` elsewhere."""
        if self._small:
            small: Array = (self._inverses @ (target * self._free)[:, :, None])[:, :, 0] * self._free
            return small
        if self._direct:
            return self._on_rows(target)
        # with K the inverse and N the rows at their bound: x = K(b + w), w = -K_NN⁻¹ (Kb)_N on N
        x = target @ self._inverse
        x -= self._on_rows(x) @ self._inverse
        return x * self._free

    def _on_rows(self, target: Array) -> Array:
        inside = np.take_along_axis(target, self._order, 1) * self._inside
        values = torch.linalg.lu_solve(*self._factors, torch.from_numpy(inside)[:, :, None])
        x = np.zeros_like(target)
        np.put_along_axis(x, self._order, values[:, :, 0].numpy(), 1)
        return x

"""Principal pivoting of many columns of a non-negative quadratic program at once, for well-conditioned H."""

from __future__ import annotations

import numpy as np
import torch

from mtl_dist.solvers.precision import Array, Bools, rounding_of

SMALL = 8192  # numbers in all blocks; up to here gathering rows costs more than it saves
_ROUNDS = 8  # 3 to 7 are enough where the matrix is well conditioned, and elsewhere it may cycle
_GUESS = 65536  # numbers in all blocks, from which on a better first guess costs less than a round


def pivot(matrix: Array, target: Array) -> tuple[Bools, Array | None, Bools]:
    """Supports of `argmin ½ xᵀHx - bᵀx` over `x >= 0` for the rows b of `target`, `[k, n]`.

    Júdice and Pires, Computers & Operations Research 21, 1994: all indices whose sign is wrong change sides.

    Returns:
        `[k, n]` supports, the inverse of H where it is of use, and `[k]` whether the support is right.
    """
    size = matrix.size * len(target)
    free = _guess(matrix, target) if size > _GUESS else target > 0
    inverse: Array | None = None
    if size > SMALL:
        inverse = np.linalg.inv(matrix).astype(np.float64, copy=False)
    ended: Bools
    ended, todo = np.zeros(len(target), dtype=bool), np.arange(len(target))
    for _ in range(_ROUNDS):
        b, now = target[todo], free[todo]
        x = Support(matrix, now, inverse).solve(b)
        pivoted = np.where(now, x > 0, x @ matrix - b < -rounding_of(x, b))
        found = (pivoted == now).all(1)
        ended[todo[found]] = True
        todo = todo[~found]
        if not len(todo):
            break
        free[todo] = pivoted[~found]
    return free, inverse, ended


def _guess(matrix: Array, target: Array) -> Bools:
    """Supports after a few sweeps of coordinate descent from 0."""
    x = np.zeros_like(target.T)
    for _ in range(3 + len(matrix) // 16):  # a sweep costs as much for one column as for many
        for j, row in enumerate(matrix):
            x[j] = np.maximum(0.0, x[j] + target[:, j] - row @ x)
    return np.ascontiguousarray(x.T > 0)


class Support:
    """`H_FF` of many supports F at once, `[k, n]`, factorised where it is large.

    With the `inverse` of H, whichever is smaller is: the rows that are free, or those at their bound.
    """

    def __init__(self, matrix: Array, free: Bools, inverse: Array | None = None) -> None:
        self._free = free
        self._inverse: Array | None = None
        self._small = matrix.size * len(free) <= SMALL
        if self._small:
            self._blocks = np.where(free[:, :, None] & free[:, None, :], matrix, np.eye(len(matrix)))
            return
        if inverse is not None and free.sum(1).max() > (~free).sum(1).max():
            self._inverse = inverse
            matrix, free = inverse, ~free
        # these rows first, padded with the identity to the largest number of them
        size = int(free.sum(1).max())
        self._order = np.argsort(~free, axis=1, kind="stable")[:, :size]
        self._inside = np.take_along_axis(free, self._order, 1)
        blocks = np.take(matrix, self._order[:, :, None] * len(matrix) + self._order[:, None, :])
        blocks *= self._inside[:, :, None] & self._inside[:, None, :]
        blocks[:, np.arange(size), np.arange(size)] += ~self._inside
        self._factors = torch.linalg.lu_factor(torch.from_numpy(blocks))

    def solve(self, target: Array) -> Array:
        """`x_F = H_FF⁻¹ b_F`, `x = 0` elsewhere, `[k, n]`."""
        if self._small:
            x = np.linalg.solve(self._blocks, (target * self._free)[:, :, None])[:, :, 0]
            return x.astype(np.float64, copy=False)
        if self._inverse is None:
            return self._on_rows(target)
        # with K the inverse and N the rows at their bound: x = K(b + w), w = -K_NN⁻¹ (Kb)_N on N
        guess = target @ self._inverse
        result: Array = (guess - self._on_rows(guess) @ self._inverse) * self._free
        return result

    def _on_rows(self, target: Array) -> Array:
        inside = np.take_along_axis(target, self._order, 1) * self._inside
        values = torch.linalg.lu_solve(*self._factors, torch.from_numpy(inside)[:, :, None])
        x = np.zeros_like(target)
        np.put_along_axis(x, self._order, values[:, :, 0].numpy(), 1)
        return x

"""Principal pivoting for a quadratic program with `x >= 0`, for many right-hand sides at once.

Júdice and Pires, Computers & Operations Research 21, 1994. It needs a well-conditioned matrix H.
"""

from __future__ import annotations

import numpy as np
import torch

from mtl_dist.solvers.precision import Array, Bools, rounding_of

# k n² for k right-hand sides; up to this size, gathering rows costs more time than it saves
SMALL = 8192
_ROUNDS = 8  # well-conditioned problems take 3 to 7, others may cycle
_GUESS = 65536  # k n² above which a better first guess costs less time than one round


def pivot(matrix: Array, target: Array) -> tuple[Bools, Array | None, Bools]:
    """Supports of `argmin ½ xᵀHx - bᵀx` over `x >= 0`, for each row b of `target`.

    In each round, every index with `x < 0` leaves the support, and every index outside it with a negative
    slope `Hx - b` enters it.

    Args:
        matrix: `[n, n]` positive definite H.
        target: `[k, n]`, one b per row.

    Returns:
        `[k, n]` supports; the inverse of H, None for small problems; `[k]`, whether pivoting ended, so that
        the support is right.
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
    """Supports after a few sweeps of coordinate descent that start from 0."""
    x = np.zeros_like(target.T)
    for _ in range(3 + len(matrix) // 16):  # one sweep takes about the same time for one column and for many
        for j, row in enumerate(matrix):
            x[j] = np.maximum(0.0, x[j] + target[:, j] - row @ x)
    return np.ascontiguousarray(x.T > 0)


class Support:
    """Linear systems with `H_FF` for many supports F at once. Large problems are factorised once.

    Args:
        matrix: `[n, n]` positive definite H.
        free: `[k, n]`, one support F per row.
        inverse: the inverse of H. If given, the smaller system is factorised: that of the indices in F, or
            that of the others.
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
        # the block of the indices in F, padded with the identity to the size of the largest block
        size = int(free.sum(1).max())
        self._order = np.argsort(~free, axis=1, kind="stable")[:, :size]
        self._inside = np.take_along_axis(free, self._order, 1)
        blocks = np.take(matrix, self._order[:, :, None] * len(matrix) + self._order[:, None, :])
        blocks *= self._inside[:, :, None] & self._inside[:, None, :]
        blocks[:, np.arange(size), np.arange(size)] += ~self._inside
        self._factors = torch.linalg.lu_factor(torch.from_numpy(blocks))

    def solve(self, target: Array) -> Array:
        """`x_F = H_FF⁻¹ b_F`, 0 elsewhere, for right-hand sides b of shape `[k, n]`."""
        if self._small:
            x = np.linalg.solve(self._blocks, (target * self._free)[:, :, None])[:, :, 0]
            return x.astype(np.float64, copy=False)
        if self._inverse is None:
            return self._on_rows(target)
        # with the inverse K and the indices N outside F: x = K(b + w), w_N = -K_NN⁻¹ (Kb)_N
        guess = target @ self._inverse
        result: Array = (guess - self._on_rows(guess) @ self._inverse) * self._free
        return result

    def _on_rows(self, target: Array) -> Array:
        inside = np.take_along_axis(target, self._order, 1) * self._inside
        values = torch.linalg.lu_solve(*self._factors, torch.from_numpy(inside)[:, :, None])
        x = np.zeros_like(target)
        np.put_along_axis(x, self._order, values[:, :, 0].numpy(), 1)
        return x

"""Linear systems of many principal blocks of one matrix."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_dist.weighting._base import Array

SMALL = 8192  # numbers in all blocks; up to here gathering rows costs more than it saves


class Support:
    """`H_FF` of many supports F at once, `[k, n]`, factorised where it is large.

    `inverse` is that of H; with `direct` it is not used, because H is too near a singular matrix.
    """

    def __init__(self, matrix: Array, inverse: Array, free: NDArray[np.bool_], *, direct: bool) -> None:
        self._free, self._inverse = free, inverse
        self._one, self._small = len(free) == 1, matrix.size * len(free) <= SMALL
        if self._one:
            self._rows = free[0].nonzero()[0]
            self._blocks = matrix[self._rows[:, None], self._rows]
            return
        if self._small:
            self._blocks = np.where(free[:, :, None] & free[:, None, :], matrix, np.eye(len(matrix)))
            return
        # whichever is smaller: the rows that are free, or those at their bound
        self._direct = direct or bool(free.sum(1).max() <= (~free).sum(1).max())
        matrix, rows = (matrix, free) if self._direct else (inverse, ~free)
        # these rows first, padded with the identity to the largest number of them
        size = int(rows.sum(1).max())
        self._order = np.argsort(~rows, axis=1, kind="stable")[:, :size]
        self._inside = np.take_along_axis(rows, self._order, 1)
        blocks = np.take(matrix, self._order[:, :, None] * len(matrix) + self._order[:, None, :])
        blocks *= self._inside[:, :, None] & self._inside[:, None, :]
        blocks[:, np.arange(size), np.arange(size)] += ~self._inside
        self._factors = torch.linalg.lu_factor(torch.from_numpy(blocks))

    def solve(self, target: Array) -> Array:
        """`x_F = H_FF⁻¹ b_F`, `x = 0` elsewhere, `[k, n]`."""
        if self._one:
            x = np.zeros_like(target)
            x[0, self._rows] = np.linalg.solve(self._blocks, target[0, self._rows])
            return x
        if self._small:
            small: Array = np.linalg.solve(self._blocks, (target * self._free)[:, :, None])[:, :, 0]
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

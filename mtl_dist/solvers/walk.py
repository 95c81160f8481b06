"""Quadratic programs with `x >= 0`: from the solution for one right-hand side to that for another.

Let F be the support, N the other indices, and `z = Hx - b` the slope. At the solution `z_F = 0` and
`x_N = 0`. The other variables are `y = [x_F; z_N] = q`, where

    [x_F; z_N] = M [z_F; x_N] + q,    M = [[K, -K H_FN], [H_NF K, H_NN - H_NF K H_FN]],    K = H_FF⁻¹.

M is the principal pivotal transform of H, and q is linear in b. Along `q₀ + t (q₁ - q₀)`, y is linear in t
until one of its entries reaches 0. This index then moves from F to N, or from N to F. M is positive definite,
so y grows at this index again. The walk from t = 0 to t = 1 never goes back and needs no guess, even if H is
nearly singular (Cottle, Journal of Mathematical Analysis and Applications 38, 1972).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_dist.solvers.precision import Array, Bools

# k n² for k walks; above it, one small system per walk costs less time than one copy of M per walk
_TABLEAUS = 65536


class Transform:
    """M of a positive definite matrix H and a support F.

    Args:
        matrix: `[n, n]`, H.
        free: `[n]`, F.
    """

    def __init__(self, matrix: Array, free: Bools) -> None:
        self.free = free
        self.matrix = matrix
        if free.any():
            order = np.concatenate([free.nonzero()[0], (~free).nonzero()[0]])
            k = int(np.count_nonzero(free))
            ordered = matrix[order[:, None], order]
            inverse = np.linalg.inv(ordered[:k, :k])
            across = inverse @ ordered[:k, k:]
            ordered[k:, k:] -= ordered[k:, :k] @ across
            ordered[:k, :k], ordered[:k, k:], ordered[k:, :k] = inverse, -across, across.T
            self.matrix = np.empty_like(matrix)
            self.matrix[order[:, None], order] = ordered

    def offset(self, target: Array) -> Array:
        """The offsets q for right-hand sides b, both `[..., n]`."""
        q = (target * self.free) @ self.matrix.T
        result: Array = np.where(self.free, q, q - target)
        return result

    def solve(self, free: Bools, target: Array) -> Array:
        """`x_F = H_FF⁻¹ b_F`, 0 elsewhere, for supports and right-hand sides `[k, n]`."""
        (y,) = self._on_changed(free ^ self.free, self.offset(target))
        return y * free

    def walk(self, start: Array, end: Array) -> Bools:
        """Support at `q = end`, `[n]`, by a walk from `q = start >= 0`, `[n]`."""
        n = len(start)
        matrix, y, slope = self.matrix.copy(), start.copy(), end - start
        free, t, shared = self.free.copy(), 0.0, torch.from_numpy(matrix)
        for _ in range(10 * n + 10):  # a limit; usually at most n changes, but that is not proven
            falls = slope < 0
            ratio = np.where(falls, y, np.inf) / np.where(falls, -slope, 1.0)
            j = int(ratio.argmin())
            step = max(float(ratio[j]), 0.0)
            t += step
            pivot = float(matrix[j, j])
            if t >= 1 or pivot <= 0:  # arrived, or H is not positive definite
                break
            y += step * slope
            y[j] = 0.0
            free[j] ^= True
            column, row = matrix[:, j].copy(), matrix[j] / pivot
            rate = -float(slope[j]) / pivot
            slope += rate * column
            slope[j] = rate
            shared.addr_(torch.from_numpy(column), torch.from_numpy(row), alpha=-1)  # matrix -= column rowᵀ
            matrix[:, j] = column / pivot
            matrix[j] = -row
            matrix[j, j] = 1 / pivot
        return free

    def start(self, q: Array) -> Array:
        """An offset near q whose support is F: q clipped at 0, plus its largest absolute value.

        This value is taken separately among the x (on F) and among the slopes (elsewhere).
        """
        size = np.abs(q)
        inside, outside = (size.max(initial=0.0, where=side) for side in (self.free, ~self.free))
        result: Array = np.maximum(q, 0.0) + np.where(self.free, inside, outside)
        return result

    def walks(self, start: Array, end: Array) -> Bools:
        """Supports at each row of `end`, `[k, n]`, by walks from the same `start >= 0`, `[n]`."""
        start = np.repeat(start[None], len(end), 0)
        few = self.matrix.size * len(end) <= _TABLEAUS
        return self._by_tableaus(start, end - start) if few else self._by_blocks(start, end - start)

    def _by_tableaus(self, y: Array, slope: Array) -> Bools:
        """As `walk`, with a copy of M for each row."""
        free = np.repeat(self.free[None], len(y), 0)
        matrix, t, todo = np.repeat(self.matrix[None], len(y), 0), np.zeros(len(y)), np.arange(len(y))
        for _ in range(10 * y.shape[1] + 10):
            each, j, step = _first_to_fall(y, slope)
            t = t + step
            pivot = matrix[each, j, j]
            goes_on = (t < 1) & (pivot > 0)
            if not goes_on.all():
                if not goes_on.any():
                    break
                todo, matrix, y, slope = todo[goes_on], matrix[goes_on], y[goes_on], slope[goes_on]
                t, step, j, pivot = t[goes_on], step[goes_on], j[goes_on], pivot[goes_on]
                each = each[: len(j)]
            y += step[:, None] * slope
            y[each, j] = 0.0
            free[todo, j] ^= True
            column, row = matrix[each, :, j], matrix[each, j] / pivot[:, None]
            rate = -slope[each, j] / pivot
            slope += rate[:, None] * column
            slope[each, j] = rate
            matrix -= column[:, :, None] * row[:, None, :]
            matrix[each, :, j] = column / pivot[:, None]
            matrix[each, j] = -row
            matrix[each, j, j] = 1 / pivot
        return free

    def _by_blocks(self, start: Array, slope: Array) -> Bools:
        """As `walk`, with one M for all rows, and for each row a system of the indices that have changed."""
        changed = np.zeros(start.shape, dtype=bool)
        t, todo = np.zeros(len(start)), np.arange(len(start))
        for _ in range(
            2 * start.shape[1]
        ):  # a limit; the active-set method corrects the rows that have not arrived
            y, rise = self._on_changed(changed[todo], start[todo], slope[todo])
            _, j, step = _first_to_fall(y + t[:, None] * rise, rise)
            t = t + step
            goes_on = t < 1
            todo, t = todo[goes_on], t[goes_on]
            if not len(todo):
                break
            changed[todo, j[goes_on]] ^= True
        return self.free ^ changed

    def _on_changed(self, changed: Bools, *offsets: Array) -> list[Array]:
        """The y of each q in `offsets` after the indices `D = changed` entered or left F: `M_DD u = -q_D`."""
        n, size = changed.shape[1], int(np.count_nonzero(changed, axis=1).max())
        if not size:
            return list(offsets)
        # the block of the indices in D, padded with the identity to the size of the largest block
        order = np.argsort(~changed, axis=1, kind="stable")[:, :size]
        inside = np.take_along_axis(changed, order, 1)
        blocks = np.take(self.matrix, order[:, :, None] * n + order[:, None, :])
        blocks *= inside[:, :, None] & inside[:, None, :]
        blocks[:, np.arange(size), np.arange(size)] += ~inside
        sides = np.stack([np.take_along_axis(q, order, 1) * inside for q in offsets], axis=2)
        values = np.linalg.solve(blocks, -sides)
        u = np.zeros((len(offsets), *changed.shape))
        for i in range(len(offsets)):
            np.put_along_axis(u[i], order, values[:, :, i], 1)
        moved = (u.reshape(-1, n) @ self.matrix.T).reshape(u.shape)
        return [np.where(changed, u[i], q + moved[i]) for i, q in enumerate(offsets)]


def _first_to_fall(y: Array, slope: Array) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
    """Row numbers; per row, the first entry of `y + s slope` that reaches 0, and the `s >= 0` there."""
    each = np.arange(len(y))
    falls = slope < 0
    ratio = np.where(falls, y, np.inf) / np.where(falls, -slope, 1.0)
    j = ratio.argmin(1)
    return each, j, np.maximum(ratio[each, j], 0.0)

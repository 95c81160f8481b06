"""Non-negative quadratic programs, followed from a right-hand side that is solved to the one asked for.

With F the support, the variables that are not 0 (x on F, the slope z = Hx - b elsewhere) are y = q, where

    [x_F; z_N] = M [z_F; x_N] + q,    M = [[K, -K H_FN], [H_NF K, H_NN - H_NF K H_FN]],    K = H_FF⁻¹,

the principal pivotal transform of H. Along `q₀ + t (q₁ - q₀)` y is linear in t until one of its entries
reaches 0; that index changes sides, and since M is positive definite, y grows there again. No step goes back
and none is a guess, however near H is to a singular matrix (Cottle, Journal of Mathematical Analysis and
Applications 38, 1972).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_dist.solvers.precision import Array, Bools

_TABLEAUS = 65536  # numbers in all tableaus; beyond, solving for the few indices that changed costs less


class Transform:
    """M of a positive definite `matrix` H, `[n, n]`, on the support `free`, `[n]`."""

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
        """The offsets q for right-hand sides b, `[..., n]`."""
        q = (target * self.free) @ self.matrix.T
        result: Array = np.where(self.free, q, q - target)
        return result

    def solve(self, free: Bools, target: Array) -> Array:
        """`x_F = H_FF⁻¹ b_F`, 0 elsewhere, for supports and right-hand sides `[k, n]`."""
        (y,) = self._on_changed(free ^ self.free, self.offset(target))
        return y * free

    def walk(self, start: Array, end: Array) -> Bools:
        """Support at q = `end`, `[n]`, from `start >= 0`."""
        n = len(start)
        matrix, y, slope = self.matrix.copy(), start.copy(), end - start
        free, t, shared = self.free.copy(), 0.0, torch.from_numpy(matrix)
        for _ in range(10 * n + 10):  # a guard: n changes or fewer are usual, but there is no theorem
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
        """An offset whose support is this one, not far from q: x and slopes moved up, each by their size."""
        size = np.abs(q)
        inside, outside = (size.max(initial=0.0, where=side) for side in (self.free, ~self.free))
        result: Array = np.maximum(q, 0.0) + np.where(self.free, inside, outside)
        return result

    def walks(self, start: Array, end: Array) -> Bools:
        """Supports at the rows of `end`, `[k, n]`, from one `start >= 0`, `[n]`."""
        start = np.repeat(start[None], len(end), 0)
        few = self.matrix.size * len(end) <= _TABLEAUS
        return self._by_tableaus(start, end - start) if few else self._by_blocks(start, end - start)

    def _by_tableaus(self, y: Array, slope: Array) -> Bools:
        """As `walk`, with a tableau for each row."""
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
        """As `walk`, with one M for all, and for each row the solution on the indices that changed sides."""
        changed = np.zeros(start.shape, dtype=bool)
        t, todo = np.zeros(len(start)), np.arange(len(start))
        for _ in range(2 * start.shape[1]):  # a guard; what is left then is for the active-set method
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
        """The y for each q of `offsets` once the indices D = `changed` changed sides: `M_DD u = -q_D`."""
        n, size = changed.shape[1], int(np.count_nonzero(changed, axis=1).max())
        if not size:
            return list(offsets)
        # these indices first, padded with the identity to the largest number of them
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
    """Row numbers, and for each row which entry of `y + s slope` reaches 0 first, and at which `s >= 0`."""
    each = np.arange(len(y))
    falls = slope < 0
    ratio = np.where(falls, y, np.inf) / np.where(falls, -slope, 1.0)
    j = ratio.argmin(1)
    return each, j, np.maximum(ratio[each, j], 0.0)

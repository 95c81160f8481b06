"""Non-negative quadratic programs one column at a time, for matrices that are nearly singular."""

from __future__ import annotations

import numpy as np
import torch

from mtl_dist.weighting._base import EPS, Array


def rounding_of(x: Array, target: Array) -> Array:
    """Rounding error of `Hx - b`, row by row, for H with a unit diagonal."""
    rounding: Array = 8 * target.shape[-1] * EPS * (np.abs(x).sum(-1, keepdims=True) + np.abs(target))
    return rounding


def interior_point(gram: Array, target: Array, ridge: float) -> Array:
    """Mehrotra's predictor-corrector method; what is smaller than its multiplier is set to 0."""
    n = len(target)
    scale = np.abs(target).max(initial=0.0) or 1.0
    b = target / scale
    hessian = gram + ridge * np.eye(n)
    x, w = np.ones(n), np.ones(n)
    for _ in range(40):  # a guard; 10 to 20 are taken, whatever the condition
        residual = hessian @ x - b - w
        mu = x @ w / n
        if mu <= EPS and np.abs(residual).max() <= 8 * n * EPS * (1 + x.sum()):
            break
        factor = torch.linalg.cholesky_ex(torch.from_numpy(hessian + np.diag(w / x)))[0]

        def step(push: Array, factor: torch.Tensor = factor, residual: Array = residual) -> Array:
            side = torch.from_numpy(push - residual)[:, None]
            solution: Array = torch.cholesky_solve(side, factor)[:, 0].numpy()
            return solution

        dx = step(-w)
        dw = -w - w / x * dx
        length = _to_boundary(x, dx), _to_boundary(w, dw)
        centre = ((x + length[0] * dx) @ (w + length[1] * dw) / n) ** 3 / mu**2
        push = -w + (centre - dx * dw) / x
        dx = step(push)
        dw = push - w / x * dx
        both = 0.995 * min(_to_boundary(x, dx), _to_boundary(w, dw))
        x, w = x + both * dx, w + both * dw
    return np.where(x > w, scale * x, 0.0)


def _to_boundary(x: Array, step: Array) -> float:
    """The longest part of the step, at most 1, that leaves `x >= 0`."""
    return 1 / max(1.0, float((-step / x).max()))


def lawson_hanson(gram: Array, target: Array, start: Array) -> Array:
    """The active-set method, from a feasible `start`: one column, never worse than it was."""
    gram = gram + 4 * len(start) * EPS * np.eye(len(start))  # no support is singular
    x = _to_minimum_on_support(gram, target, start)
    refused = np.zeros(len(x), dtype=bool)
    for _ in range(10 * len(x) + 10):  # a guard: each index enters about once
        slope = gram @ x - target
        entering = (slope < -rounding_of(x, target)) & (x == 0) & ~refused
        if not entering.any():
            break
        j = int(np.where(entering, slope, 0.0).argmin())
        step = np.where(np.arange(len(x)) == j, EPS, x)
        moved = _to_minimum_on_support(gram, target, step)
        # an index that leaves at once depends on the others up to rounding
        refused[j] = moved[j] == 0 or np.array_equal(moved, step)
        if not refused[j]:
            x = moved
    return x


def _to_minimum_on_support(gram: Array, target: Array, x: Array) -> Array:
    """From `x` to the minimum on its support, dropping on the way what would turn negative."""
    x = x.copy()
    while (free := np.flatnonzero(x)).size:
        block = gram[np.ix_(free, free)]
        goal = np.linalg.solve(block, target[free])
        if (goal > 0).all():
            x[free] = goal
            break
        # the last point on the way to the goal that is still feasible
        leaving = goal <= 0
        ratio = x[free] / np.where(leaving, x[free] - goal, 1.0)
        last = int(np.where(leaving, ratio, np.inf).argmin())
        moved = x[free] + ratio[last] * (goal - x[free])
        moved[last] = 0.0
        x[free] = np.maximum(moved, 0.0)
    return x

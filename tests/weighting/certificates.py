"""How far weights are from what their rule defines, as one number without unit, from the Gram matrix alone.

Each certificate is 0 for exact weights in exact arithmetic. `rounding` is what float64 leaves of it at best:
inner products `(Gα)_j` are sums of terms of size `‖g_j‖ ‖g_k‖ |α_k|`, so they are measured in that unit.
The functions know nothing of the solvers; the benchmark applies them to other libraries' weights as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mtl_dist.solvers.simplex import min_norm_weights

Array = NDArray[np.float64]


def unit(gram: Array, weights: Array) -> Array:
    """`[n]`, the unit of `(Gα)_j`: `‖g_j‖ Σ_k ‖g_k‖ |α_k|`."""
    lengths = np.sqrt(gram.diagonal())
    size = lengths * (lengths @ np.abs(weights))
    return np.where(size > 0, size, 1.0)


def conflict(gram: Array, weights: Array) -> float:
    """By how much the update raises the loss it raises most."""
    return float(np.max(-(gram @ weights) / unit(gram, weights), initial=0.0))


def mgda(gram: Array, weights: Array) -> float:
    """Optimality of the minimum-norm point: `(Gα)_j >= αᵀGα`, `α >= 0`, `Σ α = 1`."""
    slope = gram @ weights
    gap = (weights @ slope - slope) / unit(gram, weights)
    return float(max(gap.max(), -weights.min(), abs(weights.sum() - 1)))


def dual_proj(gram: Array, weights: Array) -> float:
    """Optimality of the projection of the mean: `v >= 1/n`, `Gv >= 0`, `(v - 1/n) ⟂ Gv`."""
    n = len(gram)
    slope = gram @ weights / unit(gram, weights)
    extra = weights - 1 / n
    share = extra / max(np.abs(weights).max(), 1e-300)
    return float(max((-slope).max(), (-share).max(), np.abs(slope * share).max(), 0.0))


def fair(power: float) -> Callable[[Array, Array], float]:
    """`(Ga)_i = a_i^-p`, up to a common factor of the weights."""

    def certificate(gram: Array, weights: Array) -> float:
        if (weights <= 0).any():
            return np.inf
        # a = f α with f from the sum of the equations' logarithms
        slope = gram @ weights
        if (slope <= 0).any():
            return np.inf
        spread = np.log(slope) + power * np.log(weights)
        size = unit(gram, weights) / slope  # where inner products cancel, digits are lost
        return float((np.abs(spread - spread.mean()) / size.max()).max())

    return certificate


def cagrad(c: float) -> Callable[[Array, Array], float]:
    """Duality gap of `max_d min_i ⟨g_i, d⟩` in the ball, and whether d is in it."""

    def certificate(gram: Array, weights: Array) -> float:
        n = len(gram)
        mean = np.full(n, 1 / n)
        radius = c * np.sqrt(mean @ gram @ mean)
        extra = weights - mean
        lengths = np.sqrt(gram.diagonal())
        size = radius + np.abs(weights) @ lengths
        outside = (np.sqrt(max(extra @ gram @ extra, 0.0)) - radius) / size
        improvement = gram @ weights
        worst = int(improvement.argmin())
        # weak duality, at the weights that α implies and at those of the shortest update
        gap = np.inf
        for w in (np.maximum(extra, 0.0), min_norm_weights(gram)):
            w = w / w.sum() if w.sum() > 0 else mean
            bound = w @ gram @ mean + radius * np.sqrt(max(w @ gram @ w, 0.0))
            gap = min(gap, (bound - improvement[worst]) / (size * (w @ lengths + lengths[worst])))
        return float(max(outside, gap))

    return certificate


def equal_projections(gram: Array, weights: Array) -> float:
    """`⟨u, g_i⟩/‖g_i‖` is the same for all tasks."""
    lengths = np.sqrt(gram.diagonal())
    projections = gram @ weights / lengths
    return float(np.ptp(projections) / max(lengths @ np.abs(weights), 1e-300))


def aligned_mtl(gram: Array, weights: Array) -> float:
    """`√s G^(1/2) w`: `‖u‖² = s wᵀPw`, with P on the span of the gradients."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > len(gram) * np.finfo(float).eps * values[-1]
    part = vectors[:, kept].T @ np.full(len(gram), 1 / len(gram))
    expected = values[kept][0] * (part @ part)
    return float(abs(weights @ gram @ weights - expected) / expected)


CERTIFICATES: dict[str, Callable[[Array, Array], float]] = {
    "aligned_mtl": aligned_mtl,
    "cagrad": cagrad(0.5),
    "conflict_free": equal_projections,
    "dual_proj": dual_proj,
    "fairgrad": fair(1.0),
    "imtlg": equal_projections,
    "mgda": mgda,
    "nash_mtl": fair(1.0),
    "primary_auxiliary": conflict,
    "upgrad": conflict,
}

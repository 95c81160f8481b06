"""The best worst-case improvement within a ball around the mean gradient, from inner products alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtl_dist.solvers.cone import project_on_dual_cone, project_on_progress
from mtl_dist.solvers.precision import EPS, RIDGE, Array
from mtl_dist.solvers.simplex import min_norm_weights
from mtl_dist.solvers.unit_gradients import cosines

_ROUNDS = 100  # a guard; 1 to 5 are taken, and bisection alone would need about 60


def conflict_averse(gram: Array, c: float) -> Array:
    """Weights `u + x` of `argmax minᵢ ⟨gᵢ, d⟩` over `‖d - g₀‖ <= c‖g₀‖`, with `g₀ = Jᵀu`, `u = 1/n`.

    `d(θ) = g₀ + Jᵀx(θ)`, the point nearest to g₀ with `⟨gᵢ, d⟩ >= θ` for all tasks, moves away from g₀ as θ
    grows; the answer is where it reaches the radius. On a fixed support x is linear in θ, so that a support
    that is guessed right gives the exact answer by one quadratic equation; else its θ is the next guess,
    inside a bracket that shrinks.
    """
    n = len(gram)
    u: Array = np.full(n, 1 / n)
    mean = gram @ u  # ⟨g_i, g₀⟩
    radius = c * float(u @ mean) ** 0.5 if u @ mean > 0 else 0.0
    if radius == 0:
        return u
    lengths = np.sqrt(gram.diagonal())
    w = min_norm_weights(gram)
    floor = float(np.maximum(w @ gram @ w, 0.0))  # 0 at a Pareto-stationary point, and there θ <= 0
    stationary = floor <= 8 * n * EPS * (w @ lengths) ** 2
    x = project_on_dual_cone(gram, u) - u
    if x @ gram @ x > radius**2:
        low, high = mean.min(), 0.0
    elif stationary:
        return _sum(u, x)
    else:
        low, high = 0.0, w @ mean + radius * floor**0.5  # weak duality
    theta = np.inf
    for _ in range(_ROUNDS):
        support = np.flatnonzero(x) if x.any() else np.array([mean.argmin()])
        for ridge in (RIDGE, 4 * n * EPS):
            exact, guess = _on_support(gram, mean, radius, support, ridge)
            if _is_optimal(gram, mean, radius, exact):
                return _sum(u, exact)
        # a support that gives its own θ back is right, also where lengths differ so much that digits are gone
        if abs(guess - theta) <= 1e-13 * abs(theta) < np.inf:
            return _sum(u, exact)
        theta = guess if low < guess < high else (low + high) / 2
        if not low < theta < high:
            break
        trial = project_on_progress(gram, theta - mean)
        if trial is None or trial @ gram @ trial > radius**2:
            high = theta
        else:
            low = theta
        x = x if trial is None else trial
    return _sum(u, x)


def _sum(u: Array, x: Array) -> Array:
    result: Array = u + np.maximum(x, 0.0)
    return result


def _on_support(
    gram: Array, mean: Array, radius: float, support: NDArray[np.intp], ridge: float
) -> tuple[Array, float]:
    """`x` with equal improvements `(mean + Gx)ᵢ = θ` on the support and `‖Jᵀx‖ = radius`, and θ."""
    block, x = gram[np.ix_(support, support)], np.zeros(len(gram))
    if not (block.diagonal() > 0).all():
        return x, 0.0
    cosine, lengths = cosines(block)
    # x = θp - q solves G x = θ1 - mean; of several, the ridge, which is taken back, finds the shortest
    sides = np.stack([1 / lengths, mean[support] / lengths], axis=1)
    ridged = cosine + ridge * np.eye(len(support))
    columns = np.linalg.solve(ridged, sides)
    for _ in range(2):
        columns += np.linalg.solve(ridged, sides - cosine @ columns)
    p, q = columns.T / lengths
    # ‖Jᵀ(θp - q)‖² = radius², on the branch where it grows with θ
    square, cross, rest = p @ block @ p, p @ block @ q, q @ block @ q - radius**2
    root = float(np.sqrt(np.maximum(cross**2 - square * rest, 0.0)))
    theta = float((cross + root) / square if cross > 0 else rest / (cross - root)) if square > 0 else 0.0
    x[support] = theta * p - q
    return x, theta


def _is_optimal(gram: Array, mean: Array, radius: float, x: Array) -> bool:
    """Whether d is on the sphere and every task improves by θ, at most θ where x > 0, up to rounding."""
    lengths = np.sqrt(gram.diagonal())
    rounding = 32 * len(x) * EPS * (radius + float(gram.mean()) ** 0.5 + x @ lengths)
    improvement = mean + gram @ x
    used = x > 0
    theta = improvement[used].mean() if used.any() else np.inf
    return bool(
        (x >= 0).all()
        and abs(abs(float(x @ gram @ x)) ** 0.5 - radius) <= rounding
        and (improvement - theta >= -rounding * lengths).all()
        and (improvement[used] - theta <= rounding * lengths[used]).all()
    )

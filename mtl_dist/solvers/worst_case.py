"""The update near the mean gradient with the largest worst-case improvement."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtl_dist.solvers.cone import project_on_dual_cone, project_on_progress
from mtl_dist.solvers.precision import EPS, RIDGE, Array
from mtl_dist.solvers.simplex import min_norm_weights
from mtl_dist.solvers.unit_gradients import cosines

_ROUNDS = 100  # a limit; usually 1 to 5, and bisection alone would take about 60


def conflict_averse(gram: Array, c: float) -> Array:
    """Weights `u + x` of `argmax minᵢ ⟨gᵢ, d⟩` over `‖d - g₀‖ <= c‖g₀‖`, with `g₀ = Jᵀu`, `u = 1/n`.

    Let `d(θ) = g₀ + Jᵀx(θ)` be the point nearest to g₀ with `⟨gᵢ, d⟩ >= θ` for all i. It moves away from g₀
    as θ grows, and the solution is the d(θ) at the distance `c‖g₀‖`. On a fixed support x is linear in θ. So
    if the support is right, one quadratic equation gives the exact solution. If not, the next guess is the θ
    of that equation, or the middle of the bracket `[low, high]` if that θ is outside.

    At a Pareto-stationary point, the solution is the d nearest to g₀ that raises no loss, if it is in the
    ball.

    Certificate: d is on the sphere, every improvement is at least θ, and equal to θ where `x > 0`, up to
    rounding. If the lengths of the gradients differ so much that this test fails, the search ends at a
    support that reproduces its own θ to 13 digits.

    Source: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021.

    Args:
        gram: `[n, n]` positive semidefinite G, at any scale.
        c: radius of the ball in units of `‖g₀‖`, >= 0.

    Returns:
        `[n]` weights, >= `1/n`.
    """
    n = len(gram)
    u: Array = np.full(n, 1 / n)
    mean = gram @ u  # ⟨gᵢ, g₀⟩
    radius = c * float(u @ mean) ** 0.5 if u @ mean > 0 else 0.0
    if radius == 0:
        return u
    lengths = np.sqrt(gram.diagonal())
    w = min_norm_weights(gram)
    floor = float(np.maximum(w @ gram @ w, 0.0))  # 0 at a Pareto-stationary point, where θ <= 0
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
        # a support that reproduces its own θ is right, even if very different lengths cost too many digits
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
    # x = θp - q solves Gx = θ1 - mean; the ridge selects the shortest of several solutions, and the two
    # refinements remove its effect
    sides = np.stack([1 / lengths, mean[support] / lengths], axis=1)
    ridged = cosine + ridge * np.eye(len(support))
    columns = np.linalg.solve(ridged, sides)
    for _ in range(2):
        columns += np.linalg.solve(ridged, sides - cosine @ columns)
    p, q = columns.T / lengths
    # ‖Jᵀ(θp - q)‖² = radius², the root where the left side grows with θ
    square, cross, rest = p @ block @ p, p @ block @ q, q @ block @ q - radius**2
    root = float(np.sqrt(np.maximum(cross**2 - square * rest, 0.0)))
    theta = float((cross + root) / square if cross > 0 else rest / (cross - root)) if square > 0 else 0.0
    x[support] = theta * p - q
    return x, theta


def _is_optimal(gram: Array, mean: Array, radius: float, x: Array) -> bool:
    """Whether d is on the sphere, every improvement is >= θ, and <= θ where `x > 0`, up to rounding."""
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

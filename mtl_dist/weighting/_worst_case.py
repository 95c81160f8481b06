"""The best worst-case improvement within a ball around the mean gradient, from inner products alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mtl_dist.weighting._base import EPS, Array
from mtl_dist.weighting._cone import project_on_dual_cone
from mtl_dist.weighting._simplex import min_norm_weights

_ROUNDS = 200  # a guard; 2 to 8 are taken, and bisection alone would need about 100


def conflict_averse(gram: Array, c: float) -> Array:
    """Weights `u + x` of `argmax minᵢ ⟨gᵢ, d⟩` over `‖d - g₀‖ <= c‖g₀‖`, with `g₀ = Jᵀu`, `u = 1/n`.

    `d = g₀ + Jᵀx` with `x >= 0`. For a given sum ν of x, x/ν is the minimum-norm point of the hull of
    `g₀ + νgᵢ`, and `‖Jᵀx‖` grows with ν; the answer is where it reaches the radius. On a fixed support x is
    linear in ν, so a support that is guessed right gives the exact answer by one quadratic equation; else its
    ν is the next guess, inside a bracket that shrinks.
    """
    n = len(gram)
    gram = gram / gram.diagonal().max(initial=0.0) if gram.any() else gram
    u = np.full(n, 1 / n)
    mean = gram @ u  # ⟨g_i, g₀⟩
    radius = c * float(u @ mean) ** 0.5 if u @ mean > 0 else 0.0
    if radius == 0:
        return u
    lengths = np.sqrt(gram.diagonal())
    shortest = min_norm_weights(gram)
    floor = float(shortest @ gram @ shortest)  # ‖g_w‖² of MGDA's w
    low, high = radius / lengths.max(), radius / max(floor, EPS**2) ** 0.5
    if floor <= 8 * n * EPS * (shortest @ lengths) ** 2:  # Pareto-stationary: d = 0 is in the hull
        nearest = project_on_dual_cone(gram, u)
        x = nearest - u
        if x @ gram @ x <= radius**2:
            return nearest
        high = x.sum()
    nu = low
    for _ in range(_ROUNDS):
        x = nu * min_norm_weights(gram * nu**2 + nu * np.add.outer(mean, mean) + u @ mean)
        exact = _on_support(gram, mean, radius, np.flatnonzero(x))
        if _is_optimal(gram, mean, radius, exact):
            exact += u
            return exact
        if x @ gram @ x < radius**2:
            low = nu
        else:
            high = nu
        if high <= low * (1 + 4 * EPS):
            break
        guess = exact.sum()
        nu = guess if low < guess < high else np.sqrt(low * high)
    result: Array = u + x
    return result


def _on_support(gram: Array, mean: Array, radius: float, support: NDArray[np.intp]) -> Array:
    """`x` with equal improvements `(mean + Gx)ᵢ = θ` on the support, and `‖Jᵀx‖` equal to the radius."""
    k = len(support)
    block = gram[np.ix_(support, support)]
    # x = a + ν b solves G x - θ 1 = -mean, 1ᵀx = ν
    system = np.zeros((k + 1, k + 1))
    system[:k, :k] = block
    system[np.arange(k), np.arange(k)] *= 1 + 4 * len(gram) * EPS
    system[:k, k] = system[k, :k] = 1.0
    sides = np.zeros((k + 1, 2))
    sides[:k, 0], sides[k, 1] = -mean[support], 1.0
    a, b = np.linalg.solve(system, sides)[:k].T
    # ‖Jᵀ(a + νb)‖² = radius², on the branch where it grows
    quadratic, linear, rest = b @ block @ b, a @ block @ b, a @ block @ a - radius**2
    root = np.sqrt(max(linear**2 - quadratic * rest, 0.0))
    denominator, numerator = (linear + root, -rest) if linear > 0 else (quadratic, root - linear)
    x = np.zeros(len(gram))
    x[support] = a + (numerator / denominator if denominator > 0 else 0.0) * b
    return x


def _is_optimal(gram: Array, mean: Array, radius: float, x: Array) -> bool:
    """Whether d is on the sphere and every task improves by θ, at most θ where x > 0, up to rounding."""
    lengths = np.sqrt(gram.diagonal())
    size = radius + np.sqrt(gram.mean()) + x @ lengths
    rounding = 32 * len(x) * EPS * size
    improvement = mean + gram @ x
    theta = improvement[x > 0].mean() if (x > 0).any() else np.inf
    return bool(
        (x >= 0).all()
        and abs(abs(float(x @ gram @ x)) ** 0.5 - radius) <= rounding
        and (improvement - theta >= -rounding * lengths).all()
        and (improvement[x > 0] - theta <= rounding * lengths[x > 0]).all()
    )

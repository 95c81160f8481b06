"""Weights that balance the progress of each task with its weight, by damped Newton steps."""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.precision import EPS, Array
from mtl_dist.solvers.unit_gradients import cosines

_STEPS = 500  # a limit; usually 5 to 15 steps, more if gradients nearly cancel


def fair_weights(gram: Array, power: float) -> Array:
    """The solution `a > 0` of `(Ga)ᵢ = aᵢ⁻ᵖ`.

    These are the optimality conditions of `min ½ aᵀGa - Σ ψ(aᵢ)` with `ψ' = a⁻ᵖ`, a strictly convex problem.
    The solver works in the variables `zᵢ = ‖gᵢ‖ aᵢ` (times a constant), in which G becomes the matrix of
    cosines. So the lengths of the gradients do not affect its condition number.

    A solution exists unless some convex combination of the gradients is zero (Pareto stationarity). At such a
    point, and so close to one that G does not show the difference, a ridge of the size of the rounding error
    keeps the weights finite. They are then up to about 1e7 times as large as usual.

    Certificate: the last relative Newton step is at most 1e-12, or no longer decreases (only rounding error
    is left).

    Args:
        gram: `[n, n]` positive semidefinite G with a positive diagonal, at any scale.
        power: p > 0.

    Returns:
        `[n]`, a.
    """
    cosine, lengths = cosines(gram)
    np.fill_diagonal(cosine, 1 + 64 * len(gram) * EPS)
    # with aᵢ = ‖gᵢ‖^(-2/(p+1)) zᵢ/sᵢ the equations are (Cz)ᵢ = sᵢ (zᵢ/sᵢ)⁻ᵖ, where C has a unit diagonal
    s = (lengths / lengths.max()) ** ((power - 1) / (power + 1))
    z = _newton(cosine, s, power)
    result: Array = lengths ** (-2 / (power + 1)) * z / s
    return result


def _newton(cosine: Array, s: Array, power: float) -> Array:
    """The solution `z > 0` of `Cz = s (z/s)⁻ᵖ`."""
    z: Array = s * float((s @ s) / (s @ cosine @ s)) ** (1 / (power + 1))  # the best multiple of s
    last = np.inf
    for _ in range(_STEPS):
        pull = (z / s) ** -power
        slope = cosine @ z - s * pull
        step = np.linalg.solve(cosine + np.diag(power * pull * s / z), -slope)
        change = float(np.abs(step / z).max())
        # near the solution convergence is quadratic, until only rounding error is left
        if change <= 1e-12 or (change > last / 4 and last < 0.1 / max(power, 1.0)):
            break
        last = change
        decrement = -float(slope @ step)
        length = min(1.0, 0.9 / max(float((-step / z).max()), 0.5))
        # halve the step while the objective rises steeply at its end
        while length > EPS:
            moved = z + length * step
            if step @ (cosine @ moved - s * (moved / s) ** -power) <= 0.9 * decrement:
                break
            length /= 2
        z = z + length * step
    return z

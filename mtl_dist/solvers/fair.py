"""Weights that balance each task's progress against its weight, by damped Newton steps."""

from __future__ import annotations

import numpy as np

from mtl_dist.solvers.precision import EPS, Array
from mtl_dist.solvers.unit_gradients import cosines

_STEPS = 500  # a guard; 5 to 15 are taken, more where gradients nearly cancel


def fair_weights(gram: Array, power: float) -> Array:
    """The solution `a > 0` of `(Ga)ᵢ = aᵢ⁻ᵖ`, for gradients that are not zero.

    These are the optimality conditions of `min ½ aᵀGa - Σ ψ(aᵢ)` with `ψ' = a⁻ᵖ`, which is strictly convex.
    In the variables `zᵢ = ‖gᵢ‖ aᵢ` (times a constant) G becomes the matrix of cosines, so that the lengths of
    gradients do not enter its conditioning.

    A solution exists unless some convex combination of the gradients is zero (Pareto stationarity). There,
    and so near to it that G does not tell the difference, a ridge of the size of rounding error keeps the
    weights finite, at up to about 1e7 times their usual size.
    """
    cosine, lengths = cosines(gram)
    np.fill_diagonal(cosine, 1 + 64 * len(gram) * EPS)
    # with a_i = ‖g_i‖^(-2/(p+1)) z_i/s_i the equations read (Cz)_i = s_i (z_i/s_i)^-p, C with a unit diagonal
    s = (lengths / lengths.max()) ** ((power - 1) / (power + 1))
    z = _newton(cosine, s, power)
    result: Array = lengths ** (-2 / (power + 1)) * z / s
    return result


def _newton(cosine: Array, s: Array, power: float) -> Array:
    """`Cz = s (z/s)⁻ᵖ`."""
    z: Array = s * float((s @ s) / (s @ cosine @ s)) ** (1 / (power + 1))  # exact along this ray
    last = np.inf
    for _ in range(_STEPS):
        pull = (z / s) ** -power
        slope = cosine @ z - s * pull
        step = np.linalg.solve(cosine + np.diag(power * pull * s / z), -slope)
        change = float(np.abs(step / z).max())
        # near the solution a step is the square of the one before, until what is left is rounding
        if change <= 1e-12 or (change > last / 4 and last < 0.1 / max(power, 1.0)):
            break
        last = change
        decrement = -float(slope @ step)
        length = min(1.0, 0.9 / max(float((-step / z).max()), 0.5))
        # a convex function along a ray: back off while the slope has turned steeply upwards
        while length > EPS:
            moved = z + length * step
            if step @ (cosine @ moved - s * (moved / s) ** -power) <= 0.9 * decrement:
                break
            length /= 2
        z = z + length * step
    return z

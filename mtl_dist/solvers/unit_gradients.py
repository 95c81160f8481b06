"""Gradients of unit length, from inner products alone, and what becomes of gradients that are zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtl_dist.solvers.precision import EPS, Array


def cosines(gram: Array) -> tuple[Array, Array]:
    """Matrix of cosines `[n, n]` and lengths `[n]` of gradients that are not zero."""
    lengths = np.sqrt(gram.diagonal())
    return gram / np.outer(lengths, lengths), lengths


def equal_projections(cosine: Array, projections: Array) -> Array:
    """Least-squares, minimum-norm `x = C⁺p`: `Σ xⱼ ûⱼ` has projections p on the unit gradients.

    Eigenvalues that are rounding error beside the largest count as zero, and so do components of p that are
    rounding error beside p: where unit gradients cancel, x is 0 and not noise.
    """
    values, vectors = np.linalg.eigh(cosine)
    parts = vectors.T @ projections
    rounding = 4 * len(cosine) * EPS
    kept = (values > rounding * values[-1]) & (np.abs(parts) > rounding * np.linalg.norm(projections))
    result: Array = vectors[:, kept] @ (parts[kept] / values[kept])
    return result


def among_nonzero(solver: Callable[..., Array]) -> Callable[..., Array]:
    """`solver` for the tasks with a gradient; those without get the mean of the others' weights.

    A zero gradient has no direction to balance, and its weight leaves the shared update as it is. It does
    reach the task's own head, which must go on learning: a head that starts at zero sends no gradient back
    at first, and with weight 0 it never would. Where all gradients are zero, all weights are `1/n`.
    """

    def solve(gram: Array, *values: Array) -> Array:
        nonzero = gram.diagonal() > 0
        if nonzero.all():
            return solver(gram, *values)
        weights = np.full(len(gram), 1 / len(gram))
        if nonzero.any():
            weights[nonzero] = solver(gram[np.ix_(nonzero, nonzero)], *(value[nonzero] for value in values))
            weights[~nonzero] = weights[nonzero].mean()
        return weights

    return solve

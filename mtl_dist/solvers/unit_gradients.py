"""Gradients scaled to unit length: their cosines, equal projections on them, and tasks with zero gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mtl_dist.solvers.precision import EPS, Array


def cosines(gram: Array) -> tuple[Array, Array]:
    """Cosines `[n, n]` and lengths `[n]` of gradients.

    Args:
        gram: `[n, n]` with a positive diagonal.
    """
    lengths = np.sqrt(gram.diagonal())
    return gram / np.outer(lengths, lengths), lengths


def equal_projections(cosine: Array, projections: Array) -> Array:
    """Least-squares, minimum-norm solution `x = C⁺p`: `Σ xⱼûⱼ` has the projections p on the unit gradients û.

    Two cut-offs: eigenvalues that are rounding errors relative to the largest one count as zero, and so do
    components of p that are rounding errors relative to p. So x is 0, and not noise, if the unit gradients
    cancel.

    Args:
        cosine: `[n, n]`, C.
        projections: `[n]`, p.

    Returns:
        `[n]`, x.
    """
    values, vectors = np.linalg.eigh(cosine)
    parts = vectors.T @ projections
    rounding = 4 * len(cosine) * EPS
    kept = (values > rounding * values[-1]) & (np.abs(parts) > rounding * np.linalg.norm(projections))
    result: Array = vectors[:, kept] @ (parts[kept] / values[kept])
    return result


def among_nonzero(solver: Callable[..., Array]) -> Callable[..., Array]:
    """`solver` applied to the nonzero gradients; zero gradients get the mean of the other weights.

    A zero gradient has no direction, and its weight does not change the shared update. The weight does reach
    the task's own head, which must continue to learn: a head that is initialised at zero sends no gradient
    back at first, and with weight 0 this would never change. If all gradients are zero, all weights are
    `1/n`.

    Args:
        solver: a function of the Gram matrix, `[n, n]`, and of further `[n]` arrays, that returns `[n]`.

    Returns:
        A function of the same arguments.
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

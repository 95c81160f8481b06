"""Gradients of many kinds, up to n = 128, for the rules that solve a problem in the Gram matrix."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gradients(kind: str, n: int, seed: int = 0) -> Array:
    """`[n, p]`; the kinds are the keys of `KINDS`."""
    rng = np.random.default_rng([seed, n, KINDS.index(kind)])
    normal = rng.normal(size=(n, 2 * n + 3))
    if kind == "opposed":  # every gradient conflicts with most others
        return normal - 1.2 * normal.mean(0)
    if kind == "half rank":
        return rng.normal(size=(n, max(n // 2, 1))) @ rng.normal(size=(max(n // 2, 1), n + 3))
    if kind == "rank one":
        return np.outer(np.abs(rng.normal(size=n)) + 0.1, normal[0])
    if kind == "duplicates":
        return normal[np.arange(n) // 2]
    if kind == "condition 1e12":  # of the Gram
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
        return left * np.logspace(0, -6, n) @ right
    if kind == "lengths 1e-8 to 1e8":
        return np.logspace(-8, 8, n)[:, None] * normal
    if kind == "stationary":  # a convex combination is zero
        weights = rng.dirichlet(np.ones(n))
        return normal - weights @ normal
    return normal


KINDS = [
    "normal",
    "opposed",
    "half rank",
    "rank one",
    "duplicates",
    "condition 1e12",
    "lengths 1e-8 to 1e8",
    "stationary",
]
REGULAR = ("normal", "opposed", "lengths 1e-8 to 1e8")  # of full rank, and far from a lower one


def gram_of(vectors: Array) -> Array:
    gram = vectors @ vectors.T
    return (gram + gram.T) / 2

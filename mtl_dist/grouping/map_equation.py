"""The map equation: bits per step to describe a random walk, with one code for each group of nodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Groups = tuple[tuple[int, ...], ...]


def codelength(weights: npt.ArrayLike, groups: Sequence[Sequence[int]]) -> float:
    """`L = P(Σ qᵢ) - 2 Σ P(qᵢ) - Σ P(pₐ) + Σ P(qᵢ + Σ pₐ)` in bits, with `P(x) = x log₂ x`.

    With the sum W of all link weights, `pₐ` is the sum of the links of node a, divided by 2W: how often a
    random walk is there. `qᵢ` is the sum of the links that leave group i, divided by 2W. The shorter the
    description, the better the groups: walks stay inside them.

    Rosvall and Bergstrom, PNAS 2008; Su, kexue.fm/archives/7006.

    Args:
        weights: `[n, n]`, symmetric link weights >= 0 at any scale. The diagonal is not read.
        groups: the nodes of every group, numbers from 0 to n - 1; every node is in one group.

    Returns:
        L; 0 if there is no link.

    Raises:
        ValueError: weights that are not symmetric, negative or not finite; nodes that are not in exactly one
            group.
    """
    links = read_links(weights)
    nodes = [node for group in groups for node in group] if _are_lists(groups) else []
    whole = all(isinstance(node, (int, np.integer)) for node in nodes)
    if not whole or sorted(nodes) != list(range(len(links))):
        raise ValueError(f"groups must name every node from 0 to {len(links) - 1} once, got {groups!r}")
    label = np.empty(len(links), dtype=np.intp)
    for number, group in enumerate(groups):
        label[list(group)] = number
    inside = label[:, None] == label
    visits = links.sum(1)
    exits = sums(label, (links * ~inside).sum(1), len(groups))
    flow = sums(label, visits, len(groups))
    return float(plogp(exits.sum()) - (2 * plogp(exits) - plogp(exits + flow)).sum() - plogp(visits).sum())


def read_links(weights: npt.ArrayLike) -> Array:
    """`[n, n]` links divided by 2W, with a diagonal of 0.

    Raises:
        ValueError: see `codelength`.
    """
    given = np.asarray(weights)
    if given.dtype.kind not in "biuf":
        raise ValueError(f"weights must be a matrix of real numbers, got {given.dtype}")
    links = given.astype(np.float64)
    if links.ndim != 2 or links.shape[0] != links.shape[1]:
        raise ValueError(f"weights must be a square matrix, got the shape {list(links.shape)}")
    np.fill_diagonal(links, 0.0)
    if not np.isfinite(links).all() or (links < 0).any():
        raise ValueError(f"weights must be finite and >= 0, got {links[~(links >= 0) | np.isinf(links)][0]}")
    if not np.allclose(links, links.T, rtol=1e-9, atol=0):
        raise ValueError("weights must be symmetric: use (w + w.T) / 2 for a matrix w that is not")
    total = links.sum()
    return links / total if total > 0 else links


def _are_lists(groups: object) -> bool:
    return isinstance(groups, Collection) and all(isinstance(group, Collection) for group in groups)


def sums(label: npt.NDArray[np.intp], values: Array, num: int) -> Array:
    """`[num]`, the sum of the values of each label."""
    return np.bincount(label, values, num).astype(np.float64, copy=False)


def plogp(x: Any) -> Array:
    """`x log₂ x`, and 0 where rounding left x at or below 0."""
    x = np.asarray(x, dtype=np.float64)
    return np.where(x > 0, x * np.log2(np.where(x > 0, x, 1.0)), 0.0)

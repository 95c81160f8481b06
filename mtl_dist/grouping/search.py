"""A greedy search for the groups with the least codelength, for up to some hundreds of nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mtl_dist.grouping.map_equation import Array, Groups, codelength, plogp, read_links, sums

Labels = npt.NDArray[np.intp]

_LEAST = 1e-12  # bits; a smaller gain is a rounding error


def find_groups(weights: npt.ArrayLike, seed: int = 0, starts: int = 40) -> tuple[Groups, float]:
    """The groups with the least `codelength` that a greedy search finds, and that codelength in bits.

    From every node on its own, nodes move to the group that shortens the description most, until none does;
    then whole groups do, and again nodes. The order is random. Half of the starts begin so, the others with
    the best groups so far, of which some that have links are merged. The best of all is kept.

    Args:
        weights: `[n, n]`, symmetric link weights >= 0 at any scale. The diagonal is not read. Nodes without a
            link are groups of their own.
        seed: of the random orders. The same seed gives the same groups.
        starts: number of starts.

    Returns:
        The groups, each in ascending order, sorted by their first node; and the codelength.

    Raises:
        ValueError: weights that are not symmetric, negative or not finite, `starts < 1`, or `seed < 0`.
    """
    for name, value, low in (("starts", starts, 1), ("seed", seed, 0)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}")
    links, rng = read_links(weights), np.random.default_rng(seed)
    alone: Labels = np.arange(len(links))
    # all in one group is a candidate too: no single move leads there from a plain local minimum
    best = np.where(links.any(1), -1, alone)
    bits = codelength(links, _as_groups(best))
    for start in range(starts):
        label = _descend(links, alone if start < (starts + 1) // 2 else _merge_some(links, best, rng), rng)
        found = codelength(links, _as_groups(label))
        if found < bits - _LEAST:
            best, bits = label, found
    return _as_groups(best), bits


def _merge_some(links: Array, label: Labels, rng: np.random.Generator) -> Labels:
    """`[n]`, the labels after a random group took in one to three others that have links to it."""
    label = label.copy()
    first = label[rng.integers(len(label))] if len(label) else 0
    for _ in range(rng.integers(1, 4)):
        inside = label == first
        pull = links[inside].sum(0) * ~inside
        if not pull.any():
            break
        label[label == label[rng.choice(len(label), p=pull / pull.sum())]] = first
    return label


def _descend(links: Array, label: Labels, rng: np.random.Generator) -> Labels:
    """`[n]`, labels of the groups at the local minimum below those of `label`."""
    visits = links.sum(1)
    label = np.unique(label, return_inverse=True)[1]
    while True:
        moved, label = _move(links, visits, label, rng)
        # whole groups as nodes; their links to themselves do not leave them
        names, label = np.unique(label, return_inverse=True)
        members = np.eye(len(names))[label]
        coarse = members.T @ links @ members
        np.fill_diagonal(coarse, 0.0)
        merged, outer = _move(coarse, members.T @ visits, np.arange(len(names)), rng)
        label = outer[label]
        if not moved and not merged:
            return label


def _move(links: Array, visits: Array, label: Labels, rng: np.random.Generator) -> tuple[bool, Labels]:
    """Moves nodes until no move shortens the description; whether one did, and the labels."""
    n, label = len(links), label.copy()
    leaving = links.sum(1)  # of each node, to all others
    inside = label[:, None] == label
    exits = sums(label, (links * ~inside).sum(1), n)
    flow = sums(label, visits, n)
    any_moved, again = False, True
    while again:
        again = False
        for node in rng.permutation(n):
            old = int(label[node])
            to = sums(label, links[node], n)  # links of the node to each group
            exit_without = exits[old] - leaving[node] + 2 * to[old]
            exits_with = exits + leaving[node] - 2 * to
            total = exits.sum() - exits[old] + exit_without + exits_with - exits
            # what changes of L: the groups left and entered, and the sum of all exits
            entered = _part(exits_with, flow + visits[node]) - _part(exits, flow)
            left = _part(exit_without, flow[old] - visits[node]) - _part(exits[old], flow[old])
            gain = plogp(total) - plogp(exits.sum()) + entered + left
            gain[old] = 0.0
            new = int(gain.argmin())
            if gain[new] >= -_LEAST:
                continue
            label[node], again, any_moved = new, True, True
            exits[old], exits[new] = exit_without, exits_with[new]
            flow[old] -= visits[node]
            flow[new] += visits[node]
    return any_moved, label


def _part(exits: Any, flow: Any) -> Array:
    """What a group adds to L, or each of several."""
    added: Array = plogp(exits + flow) - 2 * plogp(exits)
    return added


def _as_groups(label: Labels) -> Groups:
    groups: dict[int, list[int]] = {}
    for node, name in enumerate(label.tolist()):
        groups.setdefault(name, []).append(node)
    return tuple(sorted(tuple(group) for group in groups.values()))

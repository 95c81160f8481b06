"""Codelengths of graphs for which infomap 2.16.0 and igraph 1.0.0 gave the values here, and the search."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mtl_dist.grouping import codelength, find_groups

# Zachary, 1977: how often two of 34 members of a karate club met, weighted; from 0
KARATE = """
0:1=4 0:2=5 0:3=3 0:4=3 0:5=3 0:6=3 0:7=2 0:8=2 0:10=2 0:11=3 0:12=1 0:13=3 0:17=2 0:19=2 0:21=2 0:31=2
1:2=6 1:3=3 1:7=4 1:13=5 1:17=1 1:19=2 1:21=2 1:30=2 2:3=3 2:7=4 2:8=5 2:9=1 2:13=3 2:27=2 2:28=2 2:32=2
3:7=3 3:12=3 3:13=3 4:6=2 4:10=3 5:6=5 5:10=3 5:16=3 6:16=3 8:30=3 8:32=3 8:33=4 9:33=2 13:33=3 14:32=3
14:33=2 15:32=3 15:33=4 18:32=1 18:33=2 19:33=1 20:32=3 20:33=1 22:32=2 22:33=3 23:25=5 23:27=4 23:29=3
23:32=5 23:33=4 24:25=2 24:27=3 24:31=2 25:31=7 26:29=4 26:33=2 27:33=4 28:31=2 28:33=2 29:32=4 29:33=2
30:32=3 30:33=3 31:32=4 31:33=4 32:33=5
"""


def matrix(n: int, links: dict[tuple[int, int], float]) -> np.ndarray:
    weights = np.zeros((n, n))
    for (a, b), weight in links.items():
        weights[a, b] = weights[b, a] = weight
    return weights


def karate(*, weighted: bool) -> np.ndarray:
    links = {}
    for word in KARATE.split():
        pair, _, weight = word.partition("=")
        a, b = pair.split(":")
        links[int(a), int(b)] = float(weight) if weighted else 1.0
    assert len(links) == 78
    return matrix(34, links)


def triangles(num: int, between: dict[tuple[int, int], float]) -> np.ndarray:
    inside = {(3 * t + a, 3 * t + b): 1.0 for t in range(num) for a, b in ((0, 1), (0, 2), (1, 2))}
    return matrix(3 * num, inside | between)


def nine(weight: float) -> np.ndarray:
    """Three rings of three triangles, linked by three links of this weight."""
    ring = {(9 * s + a, 9 * s + b): 1.0 for s in range(3) for a, b in ((0, 3), (2, 6), (5, 7))}
    return triangles(9, ring | {(4, 10): weight, (8, 19): weight, (17, 22): weight})


def assert_bits(got: float, expected: float) -> None:
    assert abs(got - expected) < 1e-9, got


def test_karate_club():
    club = karate(weighted=False)
    groups, bits = find_groups(club)
    assert_bits(bits, 4.3117926458)
    assert Counter(map(len, groups)) == Counter([5, 12, 17])
    assert_bits(codelength(club, groups), 4.3117926458)
    assert_bits(codelength(club, [range(34)]), 4.7044225989)
    assert_bits(find_groups(karate(weighted=True))[1], 4.0874231588)


def test_two_triangles():
    groups, bits = find_groups(triangles(2, {(2, 3): 1.0}))
    assert groups == ((0, 1, 2), (3, 4, 5))
    assert_bits(bits, 2.3207303568)


def test_nine_triangles():
    """infomap stays at the nine; one ring as a group is shorter, also by infomap's own codelength of it."""
    alone = [(i, i + 1, i + 2) for i in range(0, 27, 3)]
    assert_bits(codelength(nine(0.8), alone), 3.5177548090)
    groups, bits = find_groups(nine(0.8))
    assert sorted(map(len, groups)) == [3] * 6 + [9]
    assert_bits(bits, 3.4964839260)
    # no merge of two triangles alone shortens the description
    assert codelength(nine(0.8), [alone[0] + alone[1], *alone[2:]]) > 3.5177548090
    # with whole links infomap finds a ring too
    assert_bits(find_groups(nine(1.0))[1], 3.5644224321)


@pytest.mark.parametrize("seed", range(5))
def test_search_finds_the_optimum_of_all_partitions(seed):
    rng = np.random.default_rng(seed)
    weights = rng.random((7, 7)) * (rng.random((7, 7)) < 0.4)
    weights = weights + weights.T
    np.fill_diagonal(weights, 0)
    best = min(codelength(weights, groups) for groups in partitions(7))
    assert_bits(find_groups(weights, seed=seed)[1], best)


def partitions(n: int):
    if n == 0:
        yield []
        return
    for smaller in partitions(n - 1):
        yield [*smaller, [n - 1]]
        for i, group in enumerate(smaller):
            yield [*smaller[:i], [*group, n - 1], *smaller[i + 1 :]]


def test_same_seed_same_groups_at_any_scale():
    club = karate(weighted=True)
    first = find_groups(club, seed=3, starts=4)
    assert find_groups(club, seed=3, starts=4) == first
    scaled = find_groups(1e-12 * club, seed=3, starts=4)
    assert scaled[0] == first[0]
    assert scaled[1] == pytest.approx(first[1], rel=1e-12)


def test_nodes_without_links_are_alone():
    weights = matrix(5, {(0, 3): 2.0})
    np.fill_diagonal(weights, 7.0)
    assert find_groups(weights) == (((0, 3), (1,), (2,), (4,)), 1.0)
    assert find_groups(np.zeros((3, 3))) == (((0,), (1,), (2,)), 0.0)


@pytest.mark.parametrize(
    ("weights", "groups", "message"),
    [
        ([[0, 1], [1, 0]], [[0]], r"groups must name every node from 0 to 1 once, got \[\[0\]\]"),
        ([[0, 1], [1, 0]], [[0, 1], [1]], "groups must name every node from 0 to 1 once"),
        ([[0, -1], [-1, 0]], [[0, 1]], "weights must be finite and >= 0, got -1"),
        ([[0, np.nan], [np.nan, 0]], [[0, 1]], "weights must be finite and >= 0, got nan"),
        ([[0, 1], [2, 0]], [[0, 1]], "weights must be symmetric"),
        ([[0, 1]], [[0]], r"weights must be a square matrix, got the shape \[1, 2\]"),
    ],
)
def test_wrong_graphs_are_named(weights, groups, message):
    with pytest.raises(ValueError, match=message):
        codelength(weights, groups)


def test_a_search_needs_a_start():
    with pytest.raises(ValueError, match="starts must be at least 1, got 0"):
        find_groups([[0, 1], [1, 0]], starts=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": -1}, "seed must be at least 0"),
        ({"seed": 1.5}, "seed must be an int"),
        ({"starts": 2.5}, "starts"),
    ],
)
def test_a_search_takes_whole_numbers(settings, message):
    with pytest.raises(ValueError, match=message):
        find_groups(np.ones((3, 3)), **settings)


@pytest.mark.parametrize("weights", [None, "ab", [["a", "b"], ["c", "d"]], np.ones((2, 2)) * 1j])
def test_links_are_real_numbers(weights):
    with pytest.raises(ValueError, match="weights must be a matrix of real numbers, got"):
        find_groups(weights)


@pytest.mark.parametrize("groups", [None, [0, 1, 2], "012", [[0.0, 1.0, 2.0]], [["0", "1", "2"]]])
def test_groups_are_lists_of_nodes(groups):
    with pytest.raises(ValueError, match="groups must name every node from 0 to 2 once, got"):
        codelength(np.ones((3, 3)), groups)

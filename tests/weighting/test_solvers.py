"""The non-negative solver's parts: a walk finds the support that the active-set method finds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mtl_dist.solvers import RIDGE, nonnegative
from mtl_dist.solvers.active_set import lawson_hanson
from mtl_dist.solvers.nonnegative import nonnegative_minimum, support_of, with_ridge
from mtl_dist.solvers.walk import Transform
from mtl_dist.weighting.helpers import to_host, transfer
from tests.weighting.certificates import conflict
from tests.weighting.gradients import KINDS, Array, gradients, gram_of


def unit_of(kind: str, n: int, seed: int = 0) -> Array:
    gram = gram_of(gradients(kind, n, seed))
    lengths = np.sqrt(gram.diagonal())
    unit = gram / np.outer(lengths, lengths)
    unit.flat[:: n + 1] = 1.0
    return unit


def columns_of(unit: Array, seed: int = 0) -> Array:
    """Right-hand sides whose minima exist, one per row; each with a positive entry."""
    columns = -np.random.default_rng(seed).normal(size=(len(unit), len(unit))) @ unit
    return columns[(columns > 0).any(1)]


def of_rank(rank: int, n: int) -> Array:
    rng = np.random.default_rng([rank, n])
    gram = gram_of(rng.normal(size=(n, rank)) @ rng.normal(size=(rank, n + 3)))
    lengths = np.sqrt(gram.diagonal())
    unit = gram / np.outer(lengths, lengths)
    unit.flat[:: n + 1] = 1.0
    return unit


def assert_same_minimum(unit: Array, columns: Array) -> None:
    """As the active-set method alone, from 0: the conditions are met, and the minimum is the same."""
    expected = np.stack(
        [
            lawson_hanson(
                unit, b, lawson_hanson(unit, b, np.zeros_like(b), RIDGE), 4 * len(b) * np.finfo(float).eps
            )
            for b in columns
        ]
    )
    got = nonnegative_minimum(unit, columns.T).T
    size = (
        np.abs(got).sum(1, keepdims=True)
        + np.abs(expected).sum(1, keepdims=True)
        + np.abs(columns).max(1)[:, None]
    )
    slope = got @ unit - columns
    assert (got >= 0).all()
    assert (slope >= -1e-12 * size).all()
    assert (np.abs(slope * (got > 0)) <= 1e-12 * size).all()
    objective = [0.5 * np.einsum("ki,ij,kj->k", x, unit, x) - (x * columns).sum(1) for x in (got, expected)]
    assert (np.abs(objective[0] - objective[1]) <= 1e-12 * size[:, 0] ** 2).all()


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_active_set_method(kind):
    for n in (3, 8, 32):
        unit = unit_of(kind, n)
        assert_same_minimum(unit, columns_of(unit))


@pytest.mark.parametrize("rank", [1, 2, 3, 5, 8, 12, 16, 23, 24])
def test_as_the_active_set_method_at_every_rank(rank):
    unit = of_rank(rank, 24)
    assert_same_minimum(unit, columns_of(unit)[:8])


@pytest.mark.parametrize("kind", ["half rank", "condition 1e12", "stationary"])
def test_upgrad_of_128_nearly_dependent_gradients_is_exact(kind):
    gram = gram_of(gradients(kind, 128))
    x = nonnegative_minimum(gram, -gram / 128)
    assert conflict(gram, x.sum(1) + 1 / 128) <= 1e-13


def test_a_walk_ends_at_the_support(monkeypatch):
    """By tableaus, by blocks and alone, from an exact start and a made-up one: the right support."""
    for kind in ("half rank", "condition 1e12", "opposed"):
        unit = unit_of(kind, 16)
        ridged, columns = with_ridge(unit), columns_of(unit)
        expected = np.stack([lawson_hanson(unit, b, np.zeros(16), RIDGE) > 0 for b in columns])
        mean = columns.mean(0)
        base = lawson_hanson(unit, mean, np.zeros(16), RIDGE) > 0
        transform = Transform(ridged, base)
        ends, start = transform.offset(columns), np.maximum(transform.offset(mean), 0.0)
        np.testing.assert_array_equal(transform.walks(start, ends), expected)
        with monkeypatch.context() as patch:
            patch.setattr("mtl_dist.solvers.walk._TABLEAUS", 0)
            np.testing.assert_array_equal(transform.walks(start, ends), expected)
        for b, end, support in zip(columns, ends, expected, strict=True):
            np.testing.assert_array_equal(transform.walk(transform.start(end), end), support)
            np.testing.assert_array_equal(support_of(ridged, b), support)


def test_the_transform_solves_on_any_support():
    unit = unit_of("normal", 10)
    ridged, columns = with_ridge(unit), columns_of(unit)
    free = np.random.default_rng(1).random(columns.shape) < 0.5
    x = Transform(ridged, free[0]).solve(free, columns)
    assert (x[~free] == 0).all()
    np.testing.assert_allclose(((x @ ridged) - columns)[free], 0, atol=1e-12 * np.abs(x).max())


def test_a_wrong_support_is_repaired(monkeypatch):
    """The conditions are checked, and the active-set method has the last word."""
    unit = unit_of("opposed", 12)
    columns = columns_of(unit)
    expected = nonnegative_minimum(unit, columns.T)
    monkeypatch.setattr(nonnegative, "pivot", lambda _, b: (b < 0, None, np.ones(len(b), dtype=bool)))
    np.testing.assert_allclose(nonnegative_minimum(unit, columns.T), expected, rtol=1e-7, atol=1e-9)


def test_one_transfer_holds_what_the_views_hold():
    gram = torch.from_numpy(gram_of(gradients("normal", 4))).float()
    present, vector = torch.tensor([True, False, True, True]), torch.arange(4.0)
    direct, copied = (f(gram, present, vector, 2 * gram) for f in (to_host, transfer))
    np.testing.assert_array_equal(direct[0], copied[0])
    np.testing.assert_array_equal(direct[1], copied[1])
    for a, b in zip(direct[2], copied[2], strict=True):
        assert a.shape == b.shape
        np.testing.assert_array_equal(a, b)

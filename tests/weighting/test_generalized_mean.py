"""The generalised mean against autograd of its definition, and its limits."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Equal, GeneralizedMean, GeometricMean

LOSSES = (0.03, 0.7, 1.1, 40.0)


def weights(rule, losses, present=None):
    losses = torch.tensor(losses, dtype=torch.float64)
    present = torch.ones(len(losses), dtype=torch.bool) if present is None else torch.tensor(present)
    return rule.update(TaskStats(losses, present, None, present.double()), {})[0]


@pytest.mark.parametrize("power", [-3.0, -1.0, -0.1, 0.5, 1.0, 2.0, 3.7])
def test_weights_are_the_gradient_of_the_mean(power):
    losses = torch.tensor(LOSSES, dtype=torch.float64, requires_grad=True)
    losses.pow(power).mean().pow(1 / power).backward()
    torch.testing.assert_close(weights(GeneralizedMean(power), LOSSES), losses.grad, rtol=1e-12, atol=0)


def test_power_one_is_the_mean():
    torch.testing.assert_close(weights(GeneralizedMean(1.0), LOSSES), weights(Equal(), LOSSES))


@pytest.mark.parametrize("power", [0.0, 1e-300, -1e-15, 1e-12])
def test_power_zero_is_the_geometric_mean_and_is_approached_smoothly(power):
    torch.testing.assert_close(
        weights(GeneralizedMean(power), LOSSES), weights(GeometricMean(), LOSSES), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("power", [math.inf, 1e6])
def test_large_power_is_the_maximum(power):
    torch.testing.assert_close(
        weights(GeneralizedMean(power), LOSSES), torch.tensor([0, 0, 0, 1.0]).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("power", [-math.inf, -1e6])
def test_large_negative_power_is_the_minimum(power):
    torch.testing.assert_close(
        weights(GeneralizedMean(power), LOSSES), torch.tensor([1.0, 0, 0, 0]).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("power", [-math.inf, -2.0, 0.0, 5.0, math.inf])
def test_ties_share(power):
    torch.testing.assert_close(weights(GeneralizedMean(power), [3.0] * 4), torch.full((4,), 0.25).double())


@pytest.mark.parametrize("power", [-math.inf, -500.0, -1.0, 0.0, 1.0, 500.0, math.inf])
def test_absent_tasks_do_not_count_even_where_their_power_would_overflow(power):
    # an absent task's loss reads 1, far below the others
    got = weights(GeneralizedMean(power), [1e12, 1.0, 3e12], present=[True, False, True])
    expected = weights(GeneralizedMean(power), [1e12, 3e12])
    torch.testing.assert_close(got[[0, 2]], expected)
    assert got[1] == 0


def test_power_must_be_a_number():
    with pytest.raises(ValueError, match="GeneralizedMean: power must be a number or an infinity, got nan"):
        GeneralizedMean(math.nan)

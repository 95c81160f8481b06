"""The random sketch: unbiased, within its stated bound, linear, and the same however it is fed."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mtl_dist.probes.sketch import CountSketch, size_for

CPU = torch.device("cpu")


def sketched(sketch: CountSketch, rows: Tensor, *cuts: int) -> Tensor:
    """Fed in pieces that end at `cuts`."""
    total = sketch.zeros(len(rows), CPU, torch.float64)
    edges = [0, *cuts, rows.shape[1]]
    for start, end in itertools.pairwise(edges):
        sketch.add_(total, rows[:, start:end], start)
    return sketch.fold(total)


def relative_errors(rows: Tensor, size: int, num_draws: int) -> Tensor:
    """`[num_draws, n, n]` errors of inner products, relative to the product of the norms."""
    norms = rows.norm(dim=1)
    draws = torch.stack([sketched(CountSketch(size, seed), rows) for seed in range(num_draws)])
    return (draws @ draws.mT - rows @ rows.T) / torch.outer(norms, norms)


def dense(length: int) -> Tensor:
    return torch.randn(3, length, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def one_column(length: int, width: int) -> Tensor:
    """Gradients of a layer `[length / width, width]` in which one input is active: the worst for strides."""
    rows = torch.zeros(3, length, dtype=torch.float64)
    rows[:, 5::width] = dense(length)[:, 5::width]
    return rows


CASES = {
    "short": dense(50),
    "dense": dense(3000),
    "one column, stride m": one_column(64 * 40, 64),
    "one column, stride 2 m": one_column(128 * 40, 128),
    "parallel": dense(2000)[:1] * torch.tensor([[1.0], [2.0], [-0.5]], dtype=torch.float64),
    "few large entries": dense(4000) ** 9,
}


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("case", CASES)
def test_unbiased_and_within_the_bound(case: str, size: int) -> None:
    num_draws = 200
    errors = relative_errors(CASES[case], size, num_draws)
    bound = math.sqrt(2 / size)
    # a mean of independent draws, six numbers looked at: four of its standard deviations
    assert errors.mean(0).abs().max() < 4 * bound / math.sqrt(num_draws)
    # a standard deviation estimated from few draws with heavy tails
    assert errors.square().mean(0).sqrt().max() < 1.2 * bound


@pytest.mark.parametrize("length", [3000, 100_000])
@pytest.mark.parametrize("size", [256, 1024])
def test_error_does_not_depend_on_the_length(length: int, size: int) -> None:
    error = relative_errors(dense(length), size, 10).square().mean().sqrt()
    assert 0.4 * math.sqrt(2 / size) < error < 1.2 * math.sqrt(2 / size)


@pytest.mark.parametrize("size", [1, 7, 64, 500, 5000])
@pytest.mark.parametrize("cuts", [(1,), (63, 64, 65), (128, 500), (333, 999)])
def test_the_same_in_any_pieces(size: int, cuts: tuple[int, ...]) -> None:
    rows, sketch = dense(1003), CountSketch(size, seed=5)
    torch.testing.assert_close(sketched(sketch, rows, *cuts), sketched(sketch, rows), rtol=1e-12, atol=1e-12)


def test_a_longer_sketch_than_vector_is_exact() -> None:
    rows = dense(200)
    draws = sketched(CountSketch(200, seed=9), rows)
    torch.testing.assert_close(draws @ draws.T, rows @ rows.T, rtol=1e-12, atol=1e-12)


def test_linear() -> None:
    a, b = dense(777), dense(777).flip(1)
    sketch = CountSketch(50, seed=1)
    expected = 2 * sketched(sketch, a) - 3 * sketched(sketch, b)
    torch.testing.assert_close(sketched(sketch, 2 * a - 3 * b), expected, rtol=1e-12, atol=1e-12)


def test_float32_and_less_are_added_in_float32() -> None:
    rows = dense(5000)
    sketch, exact = CountSketch(64), sketched(CountSketch(64), rows)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        total = sketch.zeros(3, CPU)
        sketch.add_(total, rows.to(dtype), 0)
        assert total.dtype == torch.float32
        assert (sketch.fold(total) - exact).abs().max() < tolerance * exact.abs().max()


def test_draws_are_fixed_by_the_seed_for_ever() -> None:
    """Frozen numbers: a change would break the agreement of ranks that run different versions."""
    signs = CountSketch(7, seed=3)._signs(60, 70, CPU, torch.float32)
    assert signs.tolist() == [-1, -1, -1, -1, -1, 1, 1, -1, -1, 1]
    assert CountSketch(1000, seed=3)._shifts(2, 6) == [156, 331, 42, 590]


def test_signs_of_neighbours_and_seeds_do_not_correlate() -> None:
    length = 1 << 16
    signs = torch.stack([CountSketch(9, seed)._signs(0, length, CPU, torch.float32) for seed in range(8)])
    limit = 5 / math.sqrt(length)
    assert signs.mean(1).abs().max() < limit
    for lag in (1, 2, 8, 63, 64, 65, 256):
        assert (signs[:, lag:] * signs[:, :-lag]).mean(1).abs().max() < limit
    assert (signs @ signs.T / length - torch.eye(8)).abs().max() < limit


def test_sizes() -> None:
    assert size_for(0.02) == 5000
    assert size_for(1.0) == 2
    assert math.sqrt(2 / size_for(0.05)) <= 0.05
    for error in (0.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=r"relative_error must be in \(0, 1\]"):
            size_for(error)
    with pytest.raises(ValueError, match="at least 1 number, got size=0"):
        CountSketch(0)

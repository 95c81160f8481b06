"""The Gram matrix of gradients: right to 1e-13 of the norms, at any scale, length and precision.

Long float32 gradients: to 1e-7, as the products of 2048 elements are rounded to float32.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtl_dist.losses import gradient_gram

CPU = torch.device("cpu")


def cosine_error(rows: list[list[Tensor | None]], got: Tensor) -> float:
    """Largest error of an inner product, per product of the two norms."""
    like = [next(g for row in rows if (g := row[leaf]) is not None) for leaf in range(len(rows[0]))]
    dense = [
        [torch.zeros_like(x) if g is None else g for g, x in zip(row, like, strict=True)] for row in rows
    ]
    matrix = torch.stack([torch.cat([g.double().flatten() for g in row]) for row in dense])
    norms = matrix.norm(dim=1)
    return float(((got - matrix @ matrix.T).abs() / torch.outer(norms, norms).clamp(min=1e-300)).max())


def gradients(n: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes] for _ in range(n)]


@pytest.mark.parametrize("shape", [(1,), (7, 3), (4096,), (4097,), (256, 512), (131, 1009), (70_000, 3)])
def test_any_length(shape: tuple[int, ...]) -> None:
    rows = gradients(5, shape)
    long = math.prod(shape) >= 1 << 14
    assert cosine_error(rows, gradient_gram(rows, CPU)) < (1e-7 if long else 1e-13)


def test_long_gradients_with_equal_signs_whose_rounding_adds_up() -> None:
    rows = [[g.abs() + 1] for (g,) in gradients(3, (300_000,))]
    assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-7


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-20, 1e-15, 1e17, 1e18, 1e30])
def test_long_gradients_out_of_the_range_of_float32_squares(scale: float) -> None:
    rows = gradients(4, (200, 100))
    rows[1][0] *= scale
    assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-13


def test_long_gradients_with_missing_and_with_zero_ones() -> None:
    rows: list[list[Tensor | None]] = gradients(4, (200, 100), (200, 100))
    rows[0][0] = rows[3][1] = None
    assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-7
    rows[1][0] = torch.zeros(200, 100)
    got = gradient_gram(rows, CPU)
    assert cosine_error(rows, got) < 1e-7


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-12, 1e12, 1e18, 1e30])
def test_any_scale_and_different_ones(scale: float) -> None:
    rows = gradients(4, (100, 100))
    rows[1][0] *= scale
    rows[2][0] *= 1e-6
    assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-13


def test_several_leaves_and_missing_gradients() -> None:
    rows: list[list[Tensor | None]] = gradients(4, (30,), (8, 8, 8))
    rows[0][1] = None
    rows[2] = [None, None]
    got = gradient_gram(rows, CPU)
    assert cosine_error(rows, got) < 1e-13
    assert not got[2].any()
    assert not got[:, 2].any()
    assert torch.equal(gradient_gram([[None], [None]], CPU), torch.zeros(2, 2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_no_precision_loses_anything_more(dtype: torch.dtype) -> None:
    rows = [[(g * 1e-6).to(dtype)] for (g,) in gradients(3, (300, 40))]  # float16: subnormal
    assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-13


def test_orthogonal_gradients_have_an_exact_zero() -> None:
    a, b = torch.zeros(10_000), torch.zeros(10_000)
    a[:5000], b[5000:] = 1.3, 0.7
    assert gradient_gram([[a], [b]], CPU)[0, 1] == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_gradients_show_and_spare_the_others(bad: float) -> None:
    rows = gradients(3, (5000,))
    rows[1][0][17] = bad
    got = gradient_gram(rows, CPU)
    assert not got[1, 1].isfinite()
    assert got[::2, ::2].isfinite().all()


def test_precision_settings_of_the_user_do_not_reach_it() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rows = gradients(3, (5000,))
            assert cosine_error(rows, gradient_gram(rows, CPU)) < 1e-13
    finally:
        torch.set_float32_matmul_precision("highest")

"""What a layout of ranks gives, beside what one process gives."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check(expected: dict[str, Any], got: dict[str, Any]) -> None:
    """Weights and Grams of all steps, and the parameters after them."""
    assert error(expected["weights"], got["weights"]) <= 1e-6
    assert error(expected["grams"], got["grams"]) <= 2e-6  # of gradients in float32, squared
    for one, many in zip(expected["parameters"], got["parameters"], strict=True):
        assert error(one, many) <= 1e-6


def error(expected: Tensor, got: Tensor) -> float:
    """Relative, of the largest entry."""
    assert expected.shape == got.shape
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-12))

"""Noticing that a rule is fed a Gram matrix which is diagonal by construction."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats

STREAK = 8  # steps in a row before anything is said
_ROUNDING = 1e-14  # of |g_i| |g_j|, float64


class DiagonalWatch:
    """Counts steps in which all tasks' gradients were exactly orthogonal.

    Gradients of tasks that share samples are orthogonal to the last bit by chance only, never many times in a
    row. The count stays on the device; the host looks at it at the 8th, 16th, 32nd, ... measured step.
    """

    def __init__(self) -> None:
        self._measured = 0
        self._streak: Tensor | None = None

    def __call__(self, total: LocalStats) -> bool:
        """Takes in a measured step; True once it has been so for long, at one of the steps it looks at."""
        diagonal, conclusive = _inspect(total.gram)
        if self._streak is None:
            self._streak = torch.zeros_like(diagonal, dtype=torch.int64)
        longer = torch.where(diagonal, self._streak + 1, torch.zeros_like(self._streak))
        self._streak = torch.where(conclusive, longer, self._streak)
        self._measured += 1
        looks = self._measured >= STREAK and self._measured & (self._measured - 1) == 0
        return looks and bool(self._streak >= STREAK)


def _inspect(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Scalar bools: all off-diagonal entries are zero; at least two tasks have a finite gradient."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    alive = (norms > 0) & norms.isfinite()
    pairs = torch.outer(alive, alive).triu(diagonal=1)
    # a cosine: products of norms may underflow
    cosines = gram / norms[:, None] / norms
    touching = pairs & (cosines.abs() > _ROUNDING)
    return ~touching.any(), pairs.any()


def explain_diagonal(rule: object, probe: object) -> str:
    """What is happening, and what to use."""
    return (
        f"mtl_dist: the gradients of all tasks were exactly orthogonal in {STREAK} steps in a row. Where "
        "every sample belongs to one task this is so by construction: tasks share no row of the features. "
        f"{rule!r}, which reads the whole Gram matrix, then sees no conflict and acts on norms alone, as "
        f"{probe!r} measures them. Measure where all samples meet: SharedLayerProbe() with "
        "balancer(x, heads, layer=...) at the last shared layer, or ParameterProbe()"
    )

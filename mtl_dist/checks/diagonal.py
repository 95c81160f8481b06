"""Notices that a rule receives a Gram matrix that is diagonal by construction."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_dist.checks.recent import STREAK, Recent

_ROUNDING = 1e-14  # of |g_i| |g_j|, float64


class DiagonalWatch(Recent):
    """Looks for steps in which the gradients of all tasks were exactly orthogonal.

    It takes the Gram of each step, `[n, n]`. Gradients of tasks that share samples are orthogonal to the last
    bit only by chance, never many times in a row.
    """

    def holds(self, recent: list[Tensor]) -> bool:
        """Whether in all recent steps that can tell, and in at least one, all gradients were orthogonal."""
        found = [_inspect(gram) for gram in recent]
        told = [diagonal for diagonal, conclusive in found if conclusive]
        return bool(told) and all(told)

    def text(self) -> str:
        """What happens, and what to use instead."""
        return (
            f"mtl_dist: the gradients of all tasks were exactly orthogonal in {STREAK} steps in a row. Where "
            "every sample belongs to one task, this must be so, because tasks share no row of the features. "
            f"{self.rule!r} reads the whole Gram matrix, but sees no conflict there and uses only the norms "
            f"that {self.probe!r} measures. Measure where all samples meet: SharedLayerProbe() with "
            "balancer(x, heads, layer=...) at the last shared layer, or ParameterProbe()"
        )


def _inspect(gram: Tensor) -> tuple[bool, bool]:
    """Whether all off-diagonal entries are zero; whether at least two tasks have a finite gradient."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    alive = (norms > 0) & norms.isfinite()
    pairs = torch.outer(alive, alive).triu(diagonal=1)
    # a cosine: products of norms may underflow
    cosines = gram / norms[:, None] / norms
    touching = pairs & (cosines.abs() > _ROUNDING)
    return not bool(touching.any()), bool(pairs.any())

"""Notices that a rule receives a Gram matrix that is diagonal by construction."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats

_LOGGER = logging.getLogger("mtl_dist")

STREAK = 8  # steps in a row before anything is said
_ROUNDING = 1e-14  # of |g_i| |g_j|, float64


class DiagonalWatch:
    """Counts steps in which the gradients of all tasks were exactly orthogonal.

    Gradients of tasks that share samples are orthogonal to the last bit only by chance, never many times in a
    row. The count stays on the device; the host looks at it at the 8th, 16th, 32nd, ... measured step.

    Args:
        rule: for the message.
        probe: for the message.
    """

    def __init__(self, rule: object, probe: object) -> None:
        self._rule, self._probe = rule, probe
        self._said = False
        self._measured = 0
        self._streak: Tensor | None = None

    def look(self, total: LocalStats, rank: int) -> None:
        """Takes in a measured step. Rank 0 warns the user once, when the streak is long enough."""
        if not self._said and self._is_long(total):
            self._said = True
            if rank == 0:
                _LOGGER.warning(explain_diagonal(self._rule, self._probe))

    def _is_long(self, total: LocalStats) -> bool:
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
    """What happens, and what to use instead."""
    return (
        f"mtl_dist: the gradients of all tasks were exactly orthogonal in {STREAK} steps in a row. Where "
        "every sample belongs to one task this is so by construction: tasks share no row of the features. "
        f"{rule!r} reads the whole Gram matrix, but sees no conflict there and uses only the norms that "
        f"{probe!r} measures. Measure where all samples meet: SharedLayerProbe() with "
        "balancer(x, heads, layer=...) at the last shared layer, or ParameterProbe()"
    )

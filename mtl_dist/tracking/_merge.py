"""Combines the micro-batches of one optimizer step, on the host (equations: `mtl_dist.tracking.rows`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class MicroBatch:
    """What a balancer reported about one micro-batch: vectors are `[n]`, `gram` is `[n, n]`."""

    weights: Array
    losses: Array
    counts: Array
    held: bool
    gram: Array | None

    @property
    def total(self) -> float:
        """The differentiated scalar, over the whole batch."""
        present = self.counts > 0
        return float(sum((self.weights[present] * self.losses[present]).tolist()))


@dataclass(frozen=True)
class Step:
    """One optimizer step: vectors are `[n]`, `gram` is `[n, n]`."""

    total: float
    weights: Array
    losses: Array
    present: NDArray[np.bool_]
    held: bool
    gram: Array | None


def merged(parts: Sequence[MicroBatch]) -> Step:
    """The optimizer step of which `parts` are the micro-batches."""
    if len(parts) == 1:
        only = parts[0]
        return Step(only.total, only.weights, only.losses, only.counts > 0, only.held, only.gram)
    counts = np.stack([part.counts for part in parts])
    present = counts > 0
    # mean over the micro-batches that had the task
    weights = np.stack([part.weights for part in parts]).sum(0) / _positive(present.sum(0))
    # L_i = Σ c_i l_i / C_i
    losses = (counts * np.stack([part.losses for part in parts])).sum(0) / _positive(counts.sum(0))
    total = sum(part.total for part in parts) / len(parts)
    held = any(part.held for part in parts)
    return Step(total, weights, losses, counts.sum(0) > 0, held, _merged_gram(parts))


def _merged_gram(parts: Sequence[MicroBatch]) -> Array | None:
    """The Gram matrix over the micro-batches whose gradients were measured."""
    measured = [(part.counts, part.gram) for part in parts if part.gram is not None]
    if not measured:
        return None
    counts = _positive(np.sum([c for c, _ in measured], axis=0))
    # G_ij = Σ c_i c_j G_ij / (C_i C_j)
    gram: Array = np.sum([np.outer(c, c) * gram for c, gram in measured], axis=0) / np.outer(counts, counts)
    return gram


def _positive(counts: Array) -> Array:
    return np.where(counts > 0, counts, 1.0)

"""The area under the ROC curve from histograms, which add exactly over ranks and batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUM_BINS = 4096  # each 0.006 logits wide
_RANGE = 12.0  # logits beyond ± 12 share the outer bins


def histograms(logits: Tensor, labels: Tensor) -> Tensor:
    """`[2 NUM_BINS]`: how many logits of negatives, then of positives, are in each bin.

    Args:
        logits: `[B]`.
        labels: `[B]`, 0 or 1.
    """
    place = (logits.clamp(-_RANGE, _RANGE) / _RANGE + 1) / 2 * (NUM_BINS - 1)
    return torch.bincount(place.round().long() + NUM_BINS * labels.long(), minlength=2 * NUM_BINS)


def auc(counts: Sequence[float]) -> float:
    """The area under the curve; positives and negatives in one bin count half. 0.5 if one kind is missing."""
    negatives, positives = torch.tensor(counts, dtype=torch.float64).view(2, NUM_BINS)
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return 0.5
    below = negatives.cumsum(0) - negatives / 2
    return float((positives * below).sum() / pairs)

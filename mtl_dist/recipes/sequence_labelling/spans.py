"""Spans of label sequences, and their F1: words, tagged words and names are found or not as a whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

WORD_LABELS = ("B", "M", "E", "S")  # begin, middle, end of a word; a word of one character


def word_starts(labels: Tensor) -> Tensor:
    """Where words begin, `[B, T]` bool, for any sequence of `WORD_LABELS`: at B and S, and after E and S."""
    after = torch.ones_like(labels, dtype=torch.bool)
    after[:, 1:] = labels[:, :-1] >= 2
    return after | (labels == 0) | (labels == 3)


def name_spans(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Where spans begin, `[B, T]` bool, and the kind of name of each token, `[B, T]`, 0 for none.

    Labels are 0 outside of names, `2k - 1` for the first token of a name of kind k, `2k` for the others.
    """
    kinds = (labels + 1) // 2
    starts = torch.ones_like(labels, dtype=torch.bool)
    starts[:, 1:] = kinds[:, 1:] != kinds[:, :-1]
    return starts | (labels % 2 == 1), kinds


def span_counts(starts: tuple[Tensor, Tensor], kinds: tuple[Tensor, Tensor] | None, mask: Tensor) -> Tensor:
    """`[B, 3]`: spans that both have, spans of the prediction, spans of the truth.

    Args:
        starts: prediction and truth, `[B, T]` bool: where spans begin.
        kinds: prediction and truth, `[B, T]` int64: the kind of the span that begins there. Spans of kind 0
            do not count. None: all spans count, and are of one kind.
        mask: `[B, T]` bool, true for tokens.
    """
    found, true = (start & mask for start in starts)
    same = found & true & (_ends(found) == _ends(true))
    if kinds is not None:
        same &= kinds[0] == kinds[1]
        found, true = found & (kinds[0] > 0), true & (kinds[1] > 0)
        same &= true
    return torch.stack([same.sum(1), found.sum(1), true.sum(1)], 1)


def f1(counts: Sequence[float]) -> float:
    """F1 in percent, from the sums of `span_counts`. 0 if there is no span at all."""
    both, found, true = counts[:3]
    return 200 * both / (found + true) if found + true else 0.0


def _ends(starts: Tensor) -> Tensor:
    """`[B, T]`: where the next span begins; T if there is none."""
    size = starts.shape[1]
    places = torch.where(starts, torch.arange(size, device=starts.device), size)
    nearest = places.flip(1).cummin(1).values.flip(1)
    return torch.cat([nearest[:, 1:], torch.full_like(nearest[:, :1], size)], 1)

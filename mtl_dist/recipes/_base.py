"""The interface of a recipe: data, model and metrics. A configuration names the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

from mtl_dist.canonical import ByValue

Batch = dict[str, Tensor]  # field -> [B, ...]; the keyword arguments of the model's forward


class BatchData(Protocol):
    """Samples that are fetched one batch at a time. This is faster than collating single samples."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices` as one batch, in that order."""


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of a mean. Its sums and counts add exactly over ranks and batches.

    Attributes:
        name: last part of the key `eval/<task>/<name>`.
        finish: the function from the mean over all samples to the metric.
    """

    name: str
    finish: Callable[[float], float] = float


class Recipe(ByValue, ABC):
    """A training, as a frozen dataclass of its hyperparameters. It depends only on them and on `seed`.

    Attributes:
        metrics: task -> metric. The keys are the tasks, in the order of every vector.
    """

    metrics: ClassVar[Mapping[str, Metric]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of every vector."""
        return tuple(self.metrics)

    @abstractmethod
    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples. They have no source of data in common."""

    @abstractmethod
    def model(self, balancer: nn.Module) -> nn.Module:
        """A model. Its initial parameters come from torch's global random generator.

        In training mode, its `forward(**batch)` returns the balancer's scalar. In eval mode it returns
        `[n, 3]` sums over the samples of this rank, in `stats_dtype`: loss, metric and number of samples of
        each task. A rank may have no samples.
        """

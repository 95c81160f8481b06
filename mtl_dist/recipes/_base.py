"""The contract of a shipped training: data, model and metrics, chosen by name in a configuration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn

Batch = dict[str, Tensor]  # field -> [B, ...]; the keyword arguments of the model's forward


class BatchData(Protocol):
    """Samples that are fetched a batch at a time, which saves collating them one by one."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices` as one batch, in that order."""


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of a mean, so that its sums and counts add exactly over ranks and batches.

    Attributes:
        name: last part of the key `eval/<task>/<name>`.
        finish: from the mean over all samples to the metric.
    """

    name: str
    finish: Callable[[float], float] = float


class Recipe(ABC):
    """A training: frozen dataclass of its hyperparameters, everything deterministic from `seed`.

    Attributes:
        metrics: the metric of each task; its keys are the tasks, in the order of every vector.
    """

    metrics: ClassVar[Mapping[str, Metric]]

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of every vector."""
        return tuple(self.metrics)

    @abstractmethod
    def data(self, seed: int) -> tuple[BatchData, BatchData]:
        """Training and validation samples, which share no source of data."""

    @abstractmethod
    def model(self, balancer: nn.Module) -> nn.Module:
        """A model whose parameters come from torch's global generator.

        Its `forward(**batch)` returns the balancer's scalar in training mode. In eval mode it returns
        `[n, 3]` sums over the samples of this rank, which may be none, in `stats_dtype`: loss, metric and
        number of samples of each task.
        """

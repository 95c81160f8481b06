"""The interface of a recipe: data, model and metrics. A configuration names the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mtl_dist.canonical import ByValue
from mtl_dist.stats import stats_dtype

Batch = dict[str, Tensor]  # field -> [B, ...]; the keyword arguments of the model's forward


class BatchData(Protocol):
    """Samples that are fetched one batch at a time. This is faster than collating single samples."""

    def __len__(self) -> int:
        """Number of samples."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices` as one batch, in that order."""


@dataclass(frozen=True)
class TensorData:
    """Samples that fit into memory, as one tensor for each argument of the model's forward.

    Attributes:
        fields: argument -> `[N, ...]`.
    """

    fields: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        lengths = {name: len(field) for name, field in self.fields.items()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"TensorData: all fields must have one length, got {lengths}")

    def __len__(self) -> int:
        """Number of samples."""
        return len(next(iter(self.fields.values())))

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """The samples at `indices`."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        return {name: field[index] for name, field in self.fields.items()}


def eval_sums(per_sample: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What a model returns in eval mode: `[n, 3]` sums of loss and metric, and the number of samples.

    Args:
        per_sample: loss and metric of each sample, `[B]` each, for the n tasks in their order. A task gives
            shorter tensors if some samples have no label for it.

    Raises:
        ValueError: loss and metric of a task are not vectors of one length.
    """
    rows = []
    for task, (loss, metric) in enumerate(per_sample):
        if loss.ndim != 1 or loss.shape != metric.shape:
            raise ValueError(
                f"eval_sums: task {task} needs a loss and a metric for each sample, [B] each; got the shapes "
                f"{list(loss.shape)} and {list(metric.shape)}"
            )
        dtype = stats_dtype(loss.device)
        rows.append(torch.stack([v.to(dtype).sum() for v in (loss, metric, torch.ones_like(loss))]))
    return torch.stack(rows)


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
    """A training, best as a frozen dataclass of its hyperparameters. It depends only on them and on `seed`.

    A recipe provides `metrics`, `data` and `model`. `docs/writing.md` shows a complete one.

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
        each task (`eval_sums`). A rank may have no samples.
        """

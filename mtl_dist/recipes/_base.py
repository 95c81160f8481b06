"""The interface of a recipe: data, model and metrics. A configuration names the recipe."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

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
            shorter tensors if some samples have no label for it. The metric is `[B, k]` for a `SumsMetric`.

    Raises:
        ValueError: loss and metric of a task are not vectors of one length.
    """
    rows = []
    for task, (loss, metric) in enumerate(per_sample):
        if loss.ndim != 1 or metric.ndim not in (1, 2) or len(loss) != len(metric):
            raise ValueError(
                f"eval_sums: task {task} needs a loss and a metric for each sample, [B] each; got the shapes "
                f"{list(loss.shape)} and {list(metric.shape)}"
            )
        dtype = stats_dtype(loss.device)
        rows.append((loss.to(dtype).sum(), len(loss), metric.to(dtype).sum(0).reshape(-1)))
    return eval_rows(rows)


def eval_rows(rows: Sequence[tuple[Tensor, Tensor | int, Tensor]]) -> Tensor:
    """The same from sums: the form of models whose losses are means over something else than samples.

    Args:
        rows: for the n tasks in their order: sum of the loss, what it is divided by (samples, tokens), and
            the `[k]` sums of the metric. k is 1 for a `Metric`.

    Returns:
        `[n, 2 + max k]`: loss, first sum of the metric, count, further sums.
    """
    dtype = stats_dtype(rows[0][0].device)
    width = max(len(sums) for _, _, sums in rows)
    lines = []
    for loss, count, sums in rows:
        number = torch.as_tensor(count, dtype=dtype, device=loss.device)
        line = torch.cat([torch.stack([loss.to(dtype), sums[0].to(dtype), number]), sums[1:].to(dtype)])
        lines.append(functional.pad(line, (0, width - len(sums))))
    return torch.stack(lines)


@dataclass(frozen=True)
class Metric:
    """A metric that is a function of a mean. Its sums and counts add exactly over ranks and batches.

    Attributes:
        name: last part of the key `eval/<task>/<name>`.
        finish: the function from the mean over all samples to the metric.
    """

    name: str
    finish: Callable[[float], float] = float

    def value(self, sums: Sequence[float], count: float) -> float:
        """The metric, from its sum and the number of samples."""
        return self.finish(sums[0] / count)


@dataclass(frozen=True)
class SumsMetric:
    """A metric that is a function of several sums, such as F1 or the area under a curve. It adds as exactly.

    Attributes:
        name: last part of the key `eval/<task>/<name>`.
        finish: the function from the sums over all samples to the metric. If another task has more sums,
            zeros follow.
    """

    name: str
    finish: Callable[[Sequence[float]], float]

    def value(self, sums: Sequence[float], count: float) -> float:
        """The metric, from its sums. It does not need the number of samples."""
        return self.finish(sums)


class Recipe(ByValue, ABC):
    """A training, best as a frozen dataclass of its hyperparameters. It depends only on them and on `seed`.

    A recipe provides `metrics`, `data` and `model`. `docs/writing.md` shows a complete one.

    Attributes:
        metrics: task -> metric. The keys are the tasks, in the order of every vector.
        packages: module that data or model need -> the command that installs it.
    """

    metrics: ClassVar[Mapping[str, Metric | SumsMetric]]
    packages: ClassVar[Mapping[str, str]] = {}

    def check_installed(self) -> None:
        """Looks, without importing anything, whether all that the recipe needs is there.

        Raises:
            ImportError: it is not. One sentence says what to install.
        """
        missing = [install for module, install in self.packages.items() if find_spec(module) is None]
        if missing:
            raise ImportError(f"{type(self).__name__} needs more packages: {'; '.join(missing)}")

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
        sums over the samples of this rank, in `stats_dtype`: loss, metric and number of samples of each task,
        `[n, 3]`, and further sums (`eval_sums`, `eval_rows`). A rank may have no samples.
        """

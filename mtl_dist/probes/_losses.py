"""The losses of one rank's batch: evaluated, checked, counted, and weighted into one scalar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats, stats_dtype

Losses = Mapping[str, Tensor | None]
Counts = Mapping[str, float | Tensor]
Head = Callable[[Any], Tensor | None]


@dataclass(frozen=True)
class Mixture:
    """Heads of a batch in which every sample has one task.

    Attributes:
        function: from the features to the loss of every sample (or token); None where the losses stand in
            the features' place.
        task_ids: integers, the task of every sample, an index into the tasks.
        mask: which losses count, or the weight of each; None: all of them.
    """

    function: Callable[[Any], Tensor] | None
    task_ids: Tensor
    mask: Tensor | None = None

    def __call__(self, features: Any) -> Tensor:
        """The loss of every sample."""
        losses: Tensor = features if self.function is None else self.function(features)
        return losses


Heads = Mapping[str, Head] | Callable[[Any], Losses] | Mixture


@dataclass(frozen=True)
class TaskLosses:
    """Local mean losses in task order, and the number of samples behind each.

    Attributes:
        values: n scalars; None where this rank has no sample of the task.
        counts: `[n]`, 0 where the task is absent.
        views: n sets of views of the features, of which each loss depends on its own only; None where there
            are none.
    """

    values: tuple[Tensor | None, ...]
    counts: Tensor
    views: Sequence[Sequence[Tensor]] | None = None

    @property
    def any_present(self) -> bool:
        """Whether this rank has a loss of any task."""
        return any(value is not None for value in self.values)

    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """These losses as statistics that add over ranks.

        Args:
            gram: `[n, n]`, `⟨g_i, g_j⟩` of the local mean losses; None where it was not measured.
        """
        zeros = LocalStats.zeros(len(self.values), self.counts.device)
        present = self.counts > 0
        # a task with count 0 may carry a NaN, the mean over nothing
        detached = (None if value is None else value.detach() for value in self.values)
        losses = torch.where(present, self._stacked(detached, self.counts.dtype), zeros.loss_sums)
        if gram is None:
            return LocalStats(self.counts * losses, self.counts, zeros.gram)
        pairs = torch.outer(self.counts, self.counts)
        gram = torch.where(pairs > 0, pairs * gram, zeros.gram)
        return LocalStats(self.counts * losses, self.counts, gram)

    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` in float32 (float64 for float64 losses), differentiable in the losses.

        Args:
            coefficients: `[n]`, taken as constants.
        """
        double = any(value is not None and value.dtype == torch.float64 for value in self.values)
        losses = self._stacked(self.values, torch.float64 if double else torch.float32)
        losses = torch.where(self.counts > 0, losses, torch.zeros_like(losses))
        return torch.dot(coefficients.detach().to(losses.dtype), losses)

    def _stacked(self, values: Iterable[Tensor | None], dtype: torch.dtype) -> Tensor:
        absent = torch.zeros((), dtype=dtype, device=self.counts.device)
        return torch.stack([absent if value is None else value.to(dtype) for value in values])


def collect(losses: Losses, counts: Counts | None, tasks: Sequence[str], device: torch.device) -> TaskLosses:
    """Checks a mapping of losses and puts it in task order.

    Args:
        losses: scalar tensor by task; None or absent where this rank has no sample of the task.
        counts: samples (or tokens) behind each mean, by task; None: 1 for each task present.
        tasks: the n task names.
        device: where the statistics are wanted.

    Raises:
        ValueError: an unknown task, a loss that is no floating-point scalar, a count missing or negative.
    """
    check_names(losses, "loss mapping", tasks)
    check_names(counts or {}, "count mapping", tasks)
    values = tuple(_scalar(task, losses.get(task)) for task in tasks)
    return TaskLosses(values, _count_vector(values, counts, tasks, device))


def evaluate(heads: Heads, features: Any, tasks: Sequence[str]) -> Losses:
    """Losses from heads: each function of a mapping on `features`, or one function for all.

    Raises:
        ValueError: an unknown task in the mapping, found before any head is evaluated.
        TypeError: `heads` is neither a mapping of functions nor a function returning a mapping.
    """
    if isinstance(heads, Mapping):
        check_names(heads, "heads", tasks)
        return {task: heads[task](features) for task in tasks if task in heads}
    if not callable(heads):
        raise TypeError(f"heads must be a mapping of functions or a function, got {type(heads).__name__}")
    losses = heads(features)
    if not isinstance(losses, Mapping):
        raise TypeError(f"the heads function must return a mapping of losses, got {type(losses).__name__}")
    return losses


def check_names(given: Iterable[str], what: str, tasks: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is no task: left alone it would be a task that is never there."""
    unknown = sorted(set(given) - set(tasks))
    if unknown:
        raise ValueError(f"unknown task {unknown} in the {what}; the tasks are {list(tasks)}")


def _scalar(task: str, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the loss of task {task!r} must be one floating-point number, the mean over the local samples; "
            f"got {got}"
        )
    return value.reshape(())


def _count_vector(
    values: Sequence[Tensor | None], counts: Counts | None, tasks: Sequence[str], device: torch.device
) -> Tensor:
    dtype = stats_dtype(device)
    if counts is None:
        return torch.tensor([float(value is not None) for value in values], dtype=dtype).to(device)
    entries: list[Tensor] = []
    for task, value in zip(tasks, values, strict=True):
        count = 0.0 if value is None else counts.get(task)
        if count is None:
            raise ValueError(f"task {task!r} has a loss but no count; counts has {sorted(counts)}")
        if not isinstance(count, Tensor) and not count >= 0:
            raise ValueError(f"the count of task {task!r} must be >= 0, got {count}")
        entries.append(torch.as_tensor(count, dtype=dtype).reshape(()))
    on_host = all(entry.device.type == "cpu" for entry in entries)
    # one transfer, not n
    return torch.stack(entries).to(device) if on_host else torch.stack([e.to(device) for e in entries])

"""Losses by task: heads as a mapping of functions or as one function, and local mean losses with counts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_dist.losses.base import Counts, Head, Heads, LocalLosses, Losses
from mtl_dist.losses.features import Branches, Views
from mtl_dist.losses.gradients import FeatureGradients, Gradients
from mtl_dist.stats import LocalStats, stats_dtype


@dataclass(frozen=True)
class TaskLosses(LocalLosses):
    """Local mean losses in task order, and the number of samples behind each.

    Attributes:
        values: n scalars; None where this rank has no sample of the task.
        counts: `[n]`, 0 where the task is absent.
        views: n sets of views of the features, where each loss depends only on its own set; the gradients of
            all losses then take one pass. None: one pass per task.
        dtype: float64 where a loss is, else float32.
    """

    values: tuple[Tensor | None, ...]
    counts: Tensor
    views: Views | None = None
    dtype: torch.dtype = torch.float32

    @property
    def outputs(self) -> Sequence[Tensor]:
        """The losses that have a graph."""
        return [value for value in self.values if value is not None and value.requires_grad]

    def means(self) -> Sequence[Tensor | None]:
        """The losses themselves."""
        return self.values

    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """`c_i l_i` and `c_i`."""
        losses = self._stacked(self.values, self.counts.dtype).detach()
        # a task with count 0 may have a NaN loss, the mean over nothing
        losses = torch.where(self.counts > 0, losses, torch.zeros_like(losses))
        n = len(self.values)
        return LocalStats(
            self.counts * losses, self.counts, self.counts.new_zeros(n, n) if gram is None else gram
        )

    def gradients(self, leaves: Sequence[Tensor], scale: Tensor | None) -> FeatureGradients:
        """One set of gradients per task."""
        scaled = [_scaled(value, scale) for value in self.values]
        if self.views is not None:
            sets = _in_one_pass(scaled, self.views)
        else:
            sets = [_in_one_pass([loss], [leaves])[0] for loss in scaled]
        return FeatureGradients(sets, self.counts, scale=scale)

    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` in float32 (float64 for float64 losses)."""
        losses = self._stacked(self.values, self.dtype)
        losses = torch.where(self.counts > 0, losses, torch.zeros_like(losses))
        return torch.dot(coefficients.detach().to(losses.dtype), losses)

    def _stacked(self, values: Iterable[Tensor | None], dtype: torch.dtype) -> Tensor:
        absent = torch.zeros((), dtype=dtype, device=self.counts.device)
        return torch.stack([absent if value is None else value.to(dtype) for value in values])


@dataclass(frozen=True)
class HeadMapping(Heads):
    """One function per task.

    Attributes:
        functions: by task, from the features to the local mean loss (None: no sample on this rank).
        counts: samples behind each mean, as the user gave them.
        tasks: the n task names.
    """

    functions: Mapping[str, Head]
    counts: Counts | None
    tasks: Sequence[str]

    separable: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """Every function on the same features."""
        check_names(self.functions, "heads", self.tasks)
        values = {task: self.functions[task](given) for task in self.tasks if task in self.functions}
        return collect(values, self.counts, self.tasks, device)

    def on_views(self, branches: Branches) -> TaskLosses:
        """Every function on its own copy of the features."""
        check_names(self.functions, "heads", self.tasks)
        values = {
            task: self.functions[task](copy)
            for task, copy in zip(self.tasks, branches.copies, strict=True)
            if task in self.functions
        }
        return collect(values, self.counts, self.tasks, branches.views[0][0].device)


@dataclass(frozen=True)
class JointHeads(Heads):
    """One function for all tasks, such as a decoder that they share.

    Attributes:
        function: from the features to a mapping of local mean losses by task.
        counts: as for `HeadMapping`.
        tasks: the n task names.
    """

    function: Callable[[Any], Losses]
    counts: Counts | None
    tasks: Sequence[str]

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """The function on the features."""
        losses = self.function(given)
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"the heads function must return a mapping of losses, got {type(losses).__name__}"
            )
        return collect(losses, self.counts, self.tasks, device)


@dataclass(frozen=True)
class GivenLosses(Heads):
    """No heads: the model hands over its losses, a mapping by task.

    Attributes:
        counts: as for `HeadMapping`.
        tasks: the n task names.
    """

    counts: Counts | None
    tasks: Sequence[str]

    on_losses: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """The losses that were given."""
        if not isinstance(given, Mapping):
            raise TypeError(
                f"balancer(losses) takes a mapping from task to loss, got {type(given).__name__}; "
                "with features, give the heads too: balancer(features, heads)"
            )
        return collect(given, self.counts, self.tasks, device)


def collect(
    losses: Losses, counts: Counts | None, tasks: Sequence[str], device: torch.device | None = None
) -> TaskLosses:
    """Checks a mapping of losses and puts it in task order.

    Args:
        losses: scalar tensor by task; None or missing where this rank has no sample of the task.
        counts: samples (or tokens) behind each mean, by task; None: 1 for each task present.
        tasks: the n task names.
        device: where the statistics are wanted; None: where the losses are.

    Raises:
        ValueError: an unknown task, a loss that is not a floating-point scalar, a count missing or negative.
    """
    check_names(losses, "loss mapping", tasks)
    check_names(counts or {}, "count mapping", tasks)
    values = tuple([_scalar(task, losses.get(task)) for task in tasks])
    if device is None:
        device = next((value.device for value in values if value is not None), torch.device("cpu"))
    double = torch.float64 in {value.dtype for value in values if value is not None}
    vector = _count_vector(values, counts, tasks, device)
    return TaskLosses(values, vector, dtype=torch.float64 if double else torch.float32)


def check_names(given: Iterable[str], what: str, tasks: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is not a task: such a task would silently be absent for ever."""
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


def _scaled(loss: Tensor | None, scale: Tensor | None) -> Tensor | None:
    if loss is None or scale is None:
        return loss
    # the loss is scaled, not its gradient: a float16 loss can be differentiated with 65504 at most
    return scale.to(torch.float32) * loss.to(torch.float32)


def _in_one_pass(losses: Sequence[Tensor | None], views: Views) -> list[Gradients]:
    """`∂l_i/∂z` of each loss at its own views, where no loss depends on the views of another.

    Engines with hooks in the heads (FSDP2) then see one backward of the heads, not n.
    """
    present = [i for i, loss in enumerate(losses) if loss is not None and loss.requires_grad]
    rows: list[Gradients] = [[None] * len(own) for own in views]
    if not present:
        return rows
    # the graph is kept for the engine's backward, and ends at the views: the trunk is not entered
    found = torch.autograd.grad(
        [loss for loss in losses if loss is not None and loss.requires_grad],
        [view for i in present for view in views[i]],
        retain_graph=True,
        allow_unused=True,
    )
    width = len(views[0])
    for number, i in enumerate(present):
        rows[i] = found[number * width : (number + 1) * width]
    return rows

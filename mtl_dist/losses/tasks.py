"""Losses by task: heads as a mapping of functions or as one function, and local mean losses with counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor

from mtl_dist.losses.base import Counts, Head, Heads, LocalLosses, Losses, Refuse
from mtl_dist.losses.features import Branches, Views, explain_placed
from mtl_dist.losses.gradients import FeatureGradients, Gradients
from mtl_dist.losses.silence import silence
from mtl_dist.stats import HOST, LocalStats, stats_dtype


@dataclass(frozen=True)
class TaskLosses(LocalLosses):
    """Local mean losses in task order, and the number of samples behind each.

    Attributes:
        values: n scalars; None where this rank has no sample of the task.
        counts: `[n]`, 0 where the task is absent.
        views: n sets of views of the features, where each loss depends only on its own set; the gradients of
            all losses then take one pass. None: one pass per task.
        empty: tasks whose count the host knows to be 0, so that their losses have no gradient.
        known: the counts as numbers, where the host knew all of them.
        dtype: float64 where a loss is, else float32.
    """

    values: tuple[Tensor | None, ...]
    counts: Tensor
    views: Views | None = None
    empty: frozenset[int] = frozenset()
    known: tuple[float, ...] | None = None
    dtype: torch.dtype = torch.float32

    @property
    def all_count(self) -> bool:
        """Whether the host knows that every count is positive."""
        return self.known is not None and min(self.known) > 0

    @property
    def outputs(self) -> Sequence[Tensor]:
        """The losses that have a graph."""
        return [value for value in self.values if value is not None and value.requires_grad]

    def means(self) -> Sequence[Tensor | None]:
        """The losses themselves."""
        return self.values

    def weighed(self, shares: Tensor) -> Sequence[Tensor | None]:
        """Each times its share, in float32 at least."""
        pairs = zip(self.values, shares, strict=True)
        return [None if loss is None else _precise(loss) * share.to(loss.device) for loss, share in pairs]

    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """`c_i l_i` and `c_i`."""
        losses = self._vector.detach().to(self.counts.dtype)
        return LocalStats(self.counts * losses, self.counts, gram, self.known)

    def gradients(self, leaves: Sequence[Tensor], scale: Tensor | None) -> FeatureGradients:
        """One set of gradients per task."""
        scaled = [_scaled(value, scale) for value in self.values]
        if self.views is not None:
            sets = _in_one_pass(scaled, self.views)
        else:
            sets = [_in_one_pass([loss], [leaves])[0] for loss in scaled]
        return FeatureGradients(sets, self.counts, scale=scale, all_count=self.all_count)

    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` in float32 (float64 for float64 losses)."""
        return torch.dot(coefficients.detach().to(self.dtype), self._vector)

    def nan_and_empty(self) -> Tensor:
        """`[n]` bool, tasks with count 0 and a loss that is NaN or infinite."""
        return (self.counts == 0) & ~self._stacked.detach().isfinite()

    @cached_property
    def _vector(self) -> Tensor:
        """`[n]`, the losses, 0 where the count is; with their graph."""
        if self.known is not None and not self.empty:  # those that are not there are 0
            return self._stacked
        # a task with count 0 may have a NaN loss, the mean over nothing
        return self._stacked.masked_fill(self.counts == 0, 0)

    @cached_property
    def _stacked(self) -> Tensor:
        given = [value for value in self.values if value is not None]
        if len(given) == len(self.values) and len({value.dtype for value in given}) == 1:
            return torch.stack(given).to(self.dtype)
        absent = torch.zeros((), dtype=self.dtype, device=self.counts.device)
        return torch.stack([absent if value is None else value.to(self.dtype) for value in self.values])


@dataclass(frozen=True)
class HeadMapping(Heads):
    """One function per task.

    Attributes:
        functions: by task, from the features to the local mean loss (None: no sample on this rank).
        counts: samples behind each mean, as the user gave them.
        tasks: the n task names.
        refuse: raises an error on this rank, and tells the other ranks.
    """

    functions: Mapping[str, Head]
    counts: Counts | None
    tasks: Sequence[str]
    refuse: Refuse | None = None

    separable: ClassVar[bool] = True
    apart: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """Every function on the same features."""
        _check_functions(self.functions, self.tasks)
        values = {task: self.functions[task](given) for task in self.tasks if task in self.functions}
        return collect(values, self.counts, self.tasks, device, self.refuse)

    def on_views(self, branches: Branches) -> TaskLosses:
        """Every function on its own copy of the features."""
        _check_functions(self.functions, self.tasks)
        values = {
            task: self.functions[task](copy)
            for task, copy in zip(self.tasks, branches.copies, strict=True)
            if task in self.functions
        }
        return collect(values, self.counts, self.tasks, branches.views[0][0].device, self.refuse)


@dataclass(frozen=True)
class JointHeads(Heads):
    """One function for all tasks, such as a decoder that they share.

    Attributes:
        function: from the features to a mapping of local mean losses by task.
        counts: as for `HeadMapping`.
        tasks: the n task names.
        refuse: as for `HeadMapping`.
    """

    function: Callable[[Any], Losses]
    counts: Counts | None
    tasks: Sequence[str]
    refuse: Refuse | None = None

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """The function on the features."""
        losses = self.function(given)
        if not isinstance(losses, Mapping):
            raise TypeError(
                f"the heads function must return a mapping of losses, got {type(losses).__name__}"
            )
        return collect(losses, self.counts, self.tasks, device, self.refuse)


@dataclass(frozen=True)
class GivenLosses(Heads):
    """No heads: the model hands over its losses, a mapping by task.

    Attributes:
        counts: as for `HeadMapping`.
        tasks: the n task names.
        refuse: as for `HeadMapping`.
    """

    counts: Counts | None
    tasks: Sequence[str]
    refuse: Refuse | None = None

    on_losses: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> TaskLosses:
        """The losses that were given."""
        if not isinstance(given, Mapping):
            raise TypeError(
                f"balancer(losses) takes a mapping from task to loss, got {type(given).__name__}; "
                "with features, give the heads too: balancer(features, heads)"
            )
        return collect(given, self.counts, self.tasks, device, self.refuse)


def collect(
    losses: Losses,
    counts: Counts | None,
    tasks: Sequence[str],
    device: torch.device | None = None,
    refuse: Refuse | None = None,
) -> TaskLosses:
    """Checks a mapping of losses and puts it in task order. Losses with count 0 have no gradient.

    Args:
        losses: scalar tensor by task; None or missing where this rank has no sample of the task.
        counts: samples (or tokens) behind each mean, by task; None: 1 for each task present.
        tasks: the n task names.
        device: where the statistics are wanted; None: where the losses are.
        refuse: raises an error that only the device knows of; None: the host looks at once.

    Raises:
        ValueError: an unknown task, a loss that is not a floating-point scalar, a count that is missing or no
            number of samples; a NaN loss whose count is 0, where only the device knows the count.
    """
    check_names(losses, "loss mapping", tasks)
    if counts is not None:
        check_names(counts, "count mapping", tasks)
    values = tuple([_scalar(task, losses.get(task)) for task in tasks])
    if device is None:
        device = next((value.device for value in values if value is not None), torch.device("cpu"))
    double = torch.float64 in {value.dtype for value in values if value is not None}
    total = torch.float64 if double else torch.float32
    if counts is None:
        present = tuple([float(value is not None) for value in values])
        return TaskLosses(values, _on_device(present, device), known=present, dtype=total)
    return replace(_counted(values, counts, tasks, device, refuse or _look), dtype=total)


def told_counts(counts: Counts, tasks: Sequence[str], device: torch.device) -> LocalStats:
    """Counts without their losses, which are still to come; 0 for a task that is not named.

    Raises:
        ValueError: an unknown task, or a count that is no number of samples.
    """
    check_names(counts, "count mapping", tasks)
    entries = [_count(task, counts) if task in counts else 0.0 for task in tasks]
    known = tuple([entry for entry in entries if isinstance(entry, float)])
    if len(known) == len(entries):
        vector = _on_device(known, device)
        return LocalStats(torch.zeros_like(vector), vector, None, known)
    vector = _vector(entries, device)
    return LocalStats(torch.zeros_like(vector), vector)


def _counted(
    values: tuple[Tensor | None, ...],
    counts: Counts,
    tasks: Sequence[str],
    device: torch.device,
    refuse: Refuse,
) -> TaskLosses:
    entries = [
        0.0 if value is None else _count(task, counts) for task, value in zip(tasks, values, strict=True)
    ]
    empty = frozenset([i for i, count in enumerate(entries) if isinstance(count, float) and count == 0])
    idle = [value for i, value in enumerate(values) if i in empty and _has_graph(value)]
    if idle:
        silence(idle, [value for i, value in enumerate(values) if i not in empty and _has_graph(value)])
    known = tuple([entry for entry in entries if isinstance(entry, float)])
    if len(known) == len(entries):
        return TaskLosses(values, _on_device(known, device), empty=empty, known=known)
    vector = _vector(entries, device)
    losses = TaskLosses(values, vector, empty=empty)
    wrong = ~((vector >= 0) & vector.isfinite())
    refuse(wrong.any(), partial(_wrong_counts, tasks, vector))
    hollow = losses.nan_and_empty()
    refuse(hollow.any(), partial(nan_and_empty, tasks, hollow))
    return losses


def _vector(entries: Sequence[float | Tensor], device: torch.device) -> Tensor:
    """Counts of which the device knows some."""
    dtype = stats_dtype(device)
    parts = [torch.as_tensor(entry, dtype=dtype).to(device, non_blocking=True) for entry in entries]
    return torch.stack(parts)


@lru_cache(maxsize=64)
def _on_device(counts: tuple[float, ...], device: torch.device) -> Tensor:
    """The counts as a tensor, which nobody changes: most steps have those of the step before."""
    return torch.tensor(counts, dtype=stats_dtype(device)).to(device, non_blocking=True)


def _precise(loss: Tensor) -> Tensor:
    return loss.to(torch.promote_types(loss.dtype, torch.float32))


def _has_graph(value: Tensor | None) -> TypeGuard[Tensor]:
    return value is not None and value.requires_grad


def _look(flag: Tensor, explain: Callable[[], Exception]) -> None:
    if flag:
        raise explain()


def check_names(given: Any, what: str, tasks: Sequence[str]) -> None:
    """Raises `ValueError` for a name that is no task: such a task would silently be absent for ever.

    Raises `TypeError` for what is no mapping.
    """
    if not isinstance(given, Mapping):
        raise TypeError(f"the {what} must be a mapping by task name, got {type(given).__name__}")
    unknown = sorted(set(given) - set(tasks), key=repr)
    if unknown:
        raise ValueError(
            f"unknown task {unknown} in the {what}; the tasks are {list(tasks)}. What is no task is named in "
            "Balancer(..., ignore=...)"
        )


def _check_functions(heads: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raises as `check_names`, and `TypeError` for heads that are no functions."""
    check_names(heads, "heads", tasks)
    for task, head in heads.items():
        if not callable(head):
            raise TypeError(
                f"the head of task {task!r} must be a function from the features to its loss, got "
                f"{type(head).__name__}: give lambda z: loss(head(z)), or losses alone, balancer(losses)"
            )


def _scalar(task: str, value: Tensor | None) -> Tensor | None:
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the loss of task {task!r} must be one floating-point number, the mean over the local samples; "
            f"got {got}"
        )
    if hasattr(value, "placements"):
        raise explain_placed(f"the loss of task {task!r}", value)
    return value.reshape(())


def _count(task: str, counts: Counts) -> float | Tensor:
    """The count of a task that has a loss: a number, or a tensor whose value only the device knows."""
    count: Any = counts.get(task)
    if count is None:
        raise ValueError(f"task {task!r} has a loss but no count; counts has {sorted(counts)}")
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.is_complex():
            raise ValueError(_no_count(task, f"{count.dtype} of shape {tuple(count.shape)}"))
        if count.device.type != HOST:
            return count.detach().reshape(())
    try:
        number = math.nan if isinstance(count, (str, bytes)) else float(count)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(_no_count(task, repr(count)))
    return number


def _no_count(task: str, got: str) -> str:
    return (
        f"the count of task {task!r} must be >= 0, got {got}: give one finite number, how many samples (or "
        "tokens) are behind its mean loss on this rank"
    )


def _wrong_counts(tasks: Sequence[str], counts: Tensor) -> ValueError:
    pairs = zip(tasks, counts.tolist(), strict=True)
    return ValueError("; ".join(_no_count(t, str(c)) for t, c in pairs if not 0 <= c < math.inf))


def nan_and_empty(tasks: Sequence[str], empty: Tensor) -> ValueError:
    """The error for tasks (`[n]` bool) with count 0 whose loss or gradient is NaN."""
    names = [task for task, is_empty in zip(tasks, empty.tolist(), strict=True) if is_empty]
    return ValueError(
        f"task {names} has count 0, and its loss is NaN or has NaN gradients: a mean over nothing. They "
        "reach the parameters of its head, whatever its weight. Return None from the head where there is no "
        "sample, give the count as a number that the host knows, or divide by mask.sum().clamp(min=1)"
    )


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
    outputs = [loss for loss in losses if loss is not None and loss.requires_grad]
    kinds = {loss.dtype: loss for loss in outputs}
    ones = {dtype: torch.ones_like(loss) for dtype, loss in kinds.items()}
    found = torch.autograd.grad(
        outputs,
        [view for i in present for view in views[i]],
        grad_outputs=[ones[loss.dtype] for loss in outputs],
        retain_graph=True,
        allow_unused=True,
    )
    width = len(views[0])
    for number, i in enumerate(present):
        rows[i] = found[number * width : (number + 1) * width]
    return rows

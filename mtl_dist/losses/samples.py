"""Losses by sample: a batch in which every sample (or token) has one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_dist.losses.base import Heads, LocalLosses, Refuse
from mtl_dist.losses.features import explain_placed
from mtl_dist.losses.gradients import FeatureGradients
from mtl_dist.losses.silence import silence_rows
from mtl_dist.stats import HOST, LocalStats, stats_dtype


@dataclass(frozen=True)
class SampleLosses(LocalLosses):
    """Losses of samples (or tokens) and the task of each: one rank's batch, for any number of tasks.

    Attributes:
        losses: `[N]`, float32 or float64; 0 where the mask is 0.
        tasks: `[N]` int64 in [0, n), the task of each loss.
        mask: `[N]`, in the dtype of the losses, how much each loss counts; 0: not at all.
        rows: int64 in [0, n), the task of each row of the features, in the shape of their first dimensions.
        num_tasks: n.
    """

    losses: Tensor
    tasks: Tensor
    mask: Tensor
    rows: Tensor
    num_tasks: int

    @cached_property
    def counts(self) -> Tensor:  # type: ignore[override]  # computed once, where others store it
        """`[n]`, sum of the mask of each task."""
        return self._by_task(self.mask)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # that of the losses
        """Of the losses."""
        return self.losses.dtype

    @property
    def outputs(self) -> Sequence[Tensor]:
        """The losses of all samples, as one tensor."""
        return [self.losses] if self.losses.requires_grad else []

    def means(self) -> Sequence[Tensor]:
        """Local mean losses; NaN where a task is absent."""
        return (self._sums() / self.counts).to(self.losses.dtype).unbind()

    def weighed(self, shares: Tensor) -> Sequence[Tensor]:
        """The means times their shares; 0 where a task is absent."""
        factors = torch.where(self.counts > 0, shares / self.counts, 0)
        return (self._sums() * factors).to(self.losses.dtype).unbind()

    def _sums(self) -> Tensor:
        """`[n]`, `c_i l_i`, with its graph."""
        weighted = (self.mask * self.losses).to(self.counts.dtype)
        return torch.zeros_like(self.counts).index_add(0, self.tasks, weighted)

    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """`c_i l_i` and `c_i`."""
        return LocalStats(self._by_task(self.mask * self.losses.detach()), self.counts, gram)

    def gradients(self, leaves: Sequence[Tensor], scale: Tensor | None) -> FeatureGradients:
        """One set for all tasks, by one pass: no sample's loss depends on the features of another sample.

        Raises:
            ValueError: a leaf that does not have one row per task id.
        """
        for leaf in leaves:
            if leaf.shape[: self.rows.dim()] != self.rows.shape:
                raise ValueError(
                    "features must have one row per task id: task_ids has shape "
                    f"{tuple(self.rows.shape)}, a feature tensor {tuple(leaf.shape)}"
                )
        if not self.losses.requires_grad:
            return FeatureGradients([[None] * len(leaves)], self.counts, self.rows, scale)
        total = (self.mask * self.losses).sum()
        if scale is not None:
            total = total * scale.to(total.dtype)
        found = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        return FeatureGradients([found], self.counts, self.rows, scale)

    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` in the dtype of the losses."""
        of_task = torch.where(self.counts > 0, coefficients.detach() / self.counts, 0)
        of_sample = of_task.to(self.losses.dtype)[self.tasks] * self.mask
        return (of_sample * self.losses).sum()

    def _by_task(self, values: Tensor) -> Tensor:
        """`[n]` sums of `[N]` values, in the dtype of statistics."""
        dtype = stats_dtype(values.device)
        sums = torch.zeros(self.num_tasks, dtype=dtype, device=values.device)
        return sums.index_add_(0, self.tasks, values.detach().to(dtype))


@dataclass(frozen=True)
class GivenSampleLosses(Heads):
    """No heads: the model hands over the losses of all samples, one tensor.

    Attributes:
        task_ids: integers, the task of every sample, an index into the tasks.
        mask: which losses count, or the weight of each; None: all of them.
        tasks: the n task names.
        refuse: raises an error on this rank, and tells the other ranks.
    """

    task_ids: Tensor
    mask: Tensor | None
    tasks: Sequence[str]
    refuse: Refuse

    on_losses: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> SampleLosses:
        """Checks the losses of the samples and puts them beside their tasks, without waiting for the device.

        Raises:
            ValueError: losses, ids or mask of a shape or type that cannot be; ids out of range, by `refuse`.
        """
        if not isinstance(given, Tensor) or not given.is_floating_point() or given.dim() == 0:
            raise ValueError(
                "with task_ids, losses are one floating-point tensor with a loss for every sample; got "
                + _described(given)
            )
        if hasattr(given, "placements"):
            raise explain_placed("the tensor of losses", given)
        ids = _checked_ids(self.task_ids, given)
        mask = _checked_mask(self.mask, given)
        of_loss = ids.reshape(*ids.shape, *[1] * (given.dim() - ids.dim())).expand(given.shape).flatten()
        dtype = torch.float64 if given.dtype == torch.float64 else torch.float32
        flat_mask = mask.flatten().to(dtype)
        n = len(self.tasks)
        unknown = (flat_mask != 0) & ((of_loss < 0) | (of_loss >= n))
        self.refuse(unknown.any(), partial(_unknown_ids, of_loss, unknown, n))
        if self.mask is not None:
            self._cut_off(given, mask)
        flat = given.flatten().to(dtype)
        flat = torch.where(flat_mask != 0, flat, torch.zeros_like(flat))  # what does not count may be NaN
        return SampleLosses(flat, of_loss.clamp(0, n - 1), flat_mask, ids.clamp(0, n - 1), n)

    def _cut_off(self, losses: Tensor, mask: Tensor) -> None:
        """Hidden samples have no gradient, also where their losses are NaN.

        Raises:
            ValueError: a mask that holds no weights; NaN losses where only the device sees them; by `refuse`.
        """
        if mask.is_floating_point():
            self.refuse(~((mask >= 0) & mask.isfinite()).all(), partial(_wrong_mask, mask, self.tasks))
        elif mask.dtype not in (torch.bool, torch.uint8):
            self.refuse((mask < 0).any(), partial(_wrong_mask, mask, self.tasks))
        if not losses.requires_grad:
            return
        hidden = mask == 0
        unsafe = (hidden & ~losses.detach().isfinite()).any()
        if losses.device.type != HOST:
            self.refuse(unsafe, _nan_behind_the_mask)
        elif unsafe:
            silence_rows(losses, hidden)


@dataclass(frozen=True)
class SampleHeads(Heads):
    """One function that gives the loss of every sample.

    Attributes:
        function: from the features to the losses of all samples.
        losses: what is known about these losses.
    """

    function: Callable[[Any], Tensor]
    losses: GivenSampleLosses

    apart: ClassVar[bool] = True

    def at(self, given: Any, device: torch.device | None = None) -> SampleLosses:
        """The function on the features; raises as `GivenSampleLosses.at`."""
        return self.losses.at(self.function(given), device)


def _checked_ids(ids: Any, losses: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() == 0:
        raise ValueError(f"task_ids must be an integer tensor, one id per sample; got {_described(ids)}")
    if losses.shape[: ids.dim()] != ids.shape:
        raise ValueError(
            f"losses must begin with the shape of task_ids, {tuple(ids.shape)}; got {tuple(losses.shape)}"
        )
    return ids.to(losses.device, torch.int64, non_blocking=True)


def _checked_mask(mask: Any, losses: Tensor) -> Tensor:
    if mask is None:
        return torch.ones((), device=losses.device).expand(losses.shape)
    if not isinstance(mask, Tensor) or mask.shape != losses.shape:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else repr(mask)
        raise ValueError(f"mask must be a tensor of the losses' shape, {tuple(losses.shape)}; got {got}")
    return mask.to(losses.device, non_blocking=True)


def _wrong_mask(mask: Tensor, tasks: Sequence[str]) -> ValueError:
    wrong = sorted(set(mask[~((mask >= 0) & mask.isfinite())].tolist()))
    return ValueError(
        f"mask= holds how much each sample counts, numbers >= 0 (tasks {list(tasks)}); got {wrong[:8]}"
    )


def _nan_behind_the_mask() -> ValueError:
    return ValueError(
        "mask= hides samples whose losses are NaN or infinite, and their gradients in the parameters of the "
        "heads are NaN too: replace the labels before the loss, labels = torch.where(mask, labels, 0), or "
        "leave these samples out of the batch"
    )


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _unknown_ids(ids: Tensor, unknown: Tensor, num_tasks: int) -> ValueError:
    wrong = sorted(set(ids[unknown].tolist()))
    return ValueError(
        f"task_ids must be in 0 ... {num_tasks - 1}, indices into the balancer's tasks; got {wrong[:8]}. "
        "Give a mask= that is 0 for samples without a task"
    )

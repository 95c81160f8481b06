"""A batch in which every sample has one task: its losses, and its Gram at the features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from mtl_dist.probes._features import Gradients
from mtl_dist.probes._losses import Counts, Heads, Mixture
from mtl_dist.stats import LocalStats, stats_dtype

Refuse = Callable[[Tensor, Callable[[], Exception]], None]


@dataclass(frozen=True)
class SampleLosses:
    """Losses of samples (or tokens) and the task of each. One rank's batch, whatever the number of tasks.

    Attributes:
        losses: `[N]`, float32 or float64, 0 where the mask is.
        tasks: `[N]` int64 in [0, n), the task of each loss.
        mask: `[N]`, in the dtype of the losses, how much each counts; 0 not at all.
        rows: int64 in [0, n), the task of each row of the features, in the shape of their first dimensions.
        num_tasks: n.
    """

    losses: Tensor
    tasks: Tensor
    mask: Tensor
    rows: Tensor
    num_tasks: int

    @property
    def counts(self) -> Tensor:
        """`[n]`, sum of the mask of each task."""
        return self._by_task(self.mask)

    @property
    def values(self) -> tuple[Tensor, ...]:
        """Local mean losses, without a graph; NaN where a task is absent."""
        means = self._by_task(self.mask * self.losses.detach()) / self.counts
        return means.to(self.losses.dtype).unbind()

    @property
    def any_present(self) -> bool:
        """Whether there is a graph to differentiate; samples without any task have one too."""
        return self.losses.requires_grad

    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """These losses as statistics that add over ranks.

        Args:
            gram: `[n, n]`, `c_i c_j ⟨g_i, g_j⟩`; None where it was not measured.
        """
        zeros = LocalStats.zeros(self.num_tasks, self.losses.device)
        sums = self._by_task(self.mask * self.losses.detach())
        return LocalStats(sums, self.counts, zeros.gram if gram is None else gram)

    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` over the local mean losses, differentiable in the losses.

        Args:
            coefficients: `[n]`, taken as constants.
        """
        counts = self.counts
        of_task = torch.where(counts > 0, coefficients.detach() / counts, torch.zeros_like(counts))
        of_sample = of_task.to(self.losses.dtype)[self.tasks] * self.mask
        return (of_sample * self.losses).sum()

    def gradients(self, leaves: Sequence[Tensor], scale: Tensor | None) -> Gradients:
        """`∂/∂z` of the sum of all losses, times `scale`: row s is that of `c_i l_i` of the row's task i.

        One pass, whatever the number of tasks: no sample's loss depends on another sample's features.

        Raises:
            ValueError: a leaf without one row a task id.
        """
        for leaf in leaves:
            if leaf.shape[: self.rows.dim()] != self.rows.shape:
                raise ValueError(
                    f"features must have one row a task id: task_ids has shape {tuple(self.rows.shape)}, "
                    f"a feature tensor {tuple(leaf.shape)}"
                )
        if not self.losses.requires_grad:
            return [None] * len(leaves)
        total = (self.mask * self.losses).sum()
        if scale is not None:
            total = total * scale.to(total.dtype)
        return torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)

    def gram(self, leaves: Sequence[Tensor], scale: Tensor | None) -> Tensor:
        """`[n, n]`, `c_i c_j ⟨g_i, g_j⟩` at the features: diagonal, because tasks share no row."""
        squares = torch.zeros_like(self.counts)
        rows = self.rows.flatten()
        for gradient in self.gradients(leaves, scale):
            if gradient is not None:
                width = math.prod(gradient.shape[self.rows.dim() :])
                flat = gradient.detach().reshape(len(rows), width)
                norms = torch.linalg.vector_norm(flat, dim=1, dtype=squares.dtype)
                squares.index_add_(0, rows, norms.square())
        return torch.diag(squares if scale is None else squares / scale.to(squares.dtype).square())

    def gradients_by_task(self, leaves: Sequence[Tensor], scale: Tensor | None) -> list[Gradients]:
        """`∂l_i/∂z` of each local mean loss, times `scale`: n copies, for what needs them one by one."""
        gradients, counts = self.gradients(leaves, scale), self.counts
        rows: list[Gradients] = []
        for task in range(self.num_tasks):
            own = self.rows == task
            rows.append([None if g is None else _where_rows(own, g / counts[task]) for g in gradients])
        return rows

    def _by_task(self, values: Tensor) -> Tensor:
        """`[n]` sums of `[N]` values, in the dtype of statistics."""
        dtype = stats_dtype(values.device)
        sums = torch.zeros(self.num_tasks, dtype=dtype, device=values.device)
        return sums.index_add_(0, self.tasks, values.detach().to(dtype))


def _where_rows(own: Tensor, gradient: Tensor) -> Tensor:
    """The rows where `own` holds, else zeros."""
    own = own.reshape(*own.shape, *[1] * (gradient.dim() - own.dim()))
    return torch.where(own, gradient, torch.zeros_like(gradient))


def mixed(heads: Heads | None, counts: Counts | None, task_ids: Any, mask: Any) -> Heads | None:
    """`heads` with the samples' tasks, where those are given.

    Raises:
        ValueError: arguments that do not go together.
    """
    if task_ids is None:
        if mask is not None:
            raise ValueError("mask= goes with task_ids=; losses by task take their number in counts=")
        return heads
    if counts is not None:
        raise ValueError("with task_ids=, counts follow from them: leave counts= out, and give mask=")
    if heads is not None and (isinstance(heads, Mapping) or not callable(heads)):
        raise TypeError(
            "with task_ids=, heads is one function from the features to the loss of every sample; got "
            f"{type(heads).__name__}"
        )
    return Mixture(cast("Any", heads), task_ids, mask)


def sample_losses(losses: Any, mixture: Mixture, tasks: Sequence[str], refuse: Refuse) -> SampleLosses:
    """Checks the losses of samples and puts them beside their tasks; nothing here waits for the device.

    Args:
        losses: floating-point, `[B]` or `[B, ...]`, with the shape of the task ids in front.
        mixture: whose ids and mask are meant.
        tasks: the n task names.
        refuse: raises on this rank where a flag holds, and tells the other ranks.

    Raises:
        ValueError: losses, ids or mask of a shape or type that cannot be; ids out of range, by `refuse`.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point() or losses.dim() == 0:
        got = f"{losses.dtype} of shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else repr(losses)
        raise ValueError(
            f"with task_ids, losses are one floating-point tensor with a loss for every sample; got {got}"
        )
    ids = _checked_ids(mixture.task_ids, losses)
    mask = _checked_mask(mixture.mask, losses)
    of_loss = ids.reshape(*ids.shape, *[1] * (losses.dim() - ids.dim())).expand(losses.shape).flatten()
    dtype = torch.float64 if losses.dtype == torch.float64 else torch.float32
    flat_mask = mask.flatten().to(dtype)
    unknown = (flat_mask != 0) & ((of_loss < 0) | (of_loss >= len(tasks)))
    refuse(unknown.any(), partial(_unknown_ids, of_loss, unknown, len(tasks)))
    flat = losses.flatten().to(dtype)
    flat = torch.where(flat_mask != 0, flat, torch.zeros_like(flat))  # what does not count may be NaN
    last = len(tasks) - 1
    return SampleLosses(flat, of_loss.clamp(0, last), flat_mask, ids.clamp(0, last), len(tasks))


def _checked_ids(ids: Any, losses: Tensor) -> Tensor:
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() == 0:
        got = f"{ids.dtype} of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else repr(ids)
        raise ValueError(f"task_ids must be an integer tensor, one id a sample; got {got}")
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


def _unknown_ids(ids: Tensor, unknown: Tensor, num_tasks: int) -> ValueError:
    wrong = sorted(set(ids[unknown].tolist()))
    return ValueError(
        f"task_ids must be in 0 ... {num_tasks - 1}, indices into the balancer's tasks; got {wrong[:8]}. "
        "Give a mask= that is 0 for samples without a task"
    )

"""Each task's loss in an evaluation, over all batches and ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.balancer.facade import Balancer
from mtl_dist.stats import LocalStats, stats_dtype
from mtl_dist.sync import all_reduce_sum, collective_device


class EvaluationSums:
    """Sums of losses and counts over the batches of an evaluation, on this rank until `losses` is called.

    Ranks may have different numbers of batches, and a batch need not have all tasks.

    Args:
        tasks: the n task names.
        group: the data-parallel ranks; None: all ranks.

    Attributes:
        calls: number of calls of the balancer so far, on this rank.
    """

    def __init__(self, tasks: tuple[str, ...], group: dist.ProcessGroup | None) -> None:
        self.calls = 0
        self._tasks = tasks
        self._group = group
        self._sums: Tensor | None = None

    def add(self, stats: LocalStats) -> None:
        """Adds the losses of one batch. The balancer calls it."""
        self.calls += 1
        sums = torch.stack([stats.loss_sums, stats.counts])
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums)

    def losses(self) -> dict[str, float]:
        """The mean loss of each task that had samples. One all-reduce, so all ranks must call it."""
        device = collective_device(self._group)
        nothing = torch.zeros(2, len(self._tasks), dtype=stats_dtype(device), device=device)
        mine = nothing if self._sums is None else self._sums.to(nothing)
        sums, counts = all_reduce_sum(mine, self._group).tolist()
        found = zip(self._tasks, sums, counts, strict=True)
        return {task: total / count for task, total, count in found if count}


@contextmanager
def collect_evaluation(balancer: Balancer) -> Iterator[EvaluationSums]:
    """Inside, the losses of all calls in eval mode are added up, by task.

        model.eval()
        with torch.no_grad(), collect_evaluation(model.balancer) as sums:
            for batch in loader:
                model(batch)
        losses = sums.losses()  # {"depth": 0.41, ...}, on all ranks

    Each mean is weighted by its count, as in training: give `counts` where batches have different sizes, or
    each batch counts once. The calls themselves make no collective.

    Args:
        balancer: whose calls are collected.
    """
    sums = EvaluationSums(balancer.tasks, balancer.group)
    with balancer.collecting(sums):
        yield sums

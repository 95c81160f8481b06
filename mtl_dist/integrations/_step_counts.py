"""The labels of a whole optimizer step, counted before its first micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from mtl_dist.balancer import Balancer
from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.integrations._columns import TASK_IDS
from mtl_dist.stats import stats_dtype
from mtl_dist.sync import all_reduce_sum, collective_device


class StepCounts:
    """`Engine.counts`: the count of each task in the running step, over ranks, per micro-batch."""

    def __init__(
        self, count: Callable[[Mapping[str, Any], int], Tensor], balancer: Balancer, column: str
    ) -> None:
        self._count, self._balancer, self._column = count, balancer, column
        self._counts: Tensor | None = None
        self._errors = DeferredErrors()

    def read(self, batches: list[Any]) -> None:
        """Reads all micro-batches of a step. One all-reduce, so all ranks must call it.

        Raises:
            ValueError: a batch of any rank has no task ids, so its rows had no such column; or ranks have
                different numbers of micro-batches, so that one would wait for the others.
        """
        self._errors.poll()
        group, n = self._balancer.group, len(self._balancer.tasks)
        device = collective_device(group)
        # behind the counts: batches without ids, batches, their square, ranks
        sums = torch.zeros(n + 4, dtype=stats_dtype(device), device=device)
        sums[n + 1], sums[n + 2], sums[n + 3] = len(batches), len(batches) ** 2, 1
        for batch in batches:
            if isinstance(batch, Mapping) and TASK_IDS in batch:
                sums[:n] += self._count(batch, n).to(sums)
            else:
                sums[n] += 1
        total = all_reduce_sum(sums, group)
        number, squares, ranks = total[n + 1 :]
        self._errors.watch(ranks * squares > number * number, partial(_unequal, number, ranks))
        self._errors.watch(total[n] > 0, partial(_without_column, self._column, total[n]))
        self._counts = total[:n] / max(1, len(batches))

    def read_ahead(self, trainer: Trainer) -> None:
        """Reads the batches of each step as the trainer takes them."""
        inner = trainer.get_batch_samples

        @wraps(inner)
        def get_batch_samples(*args: Any, **kwargs: Any) -> Any:
            batches, number = inner(*args, **kwargs)
            self.read(batches)
            return batches, number

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign]  # as a subclass would

    def __call__(self) -> Tensor:
        """`[n]`.

        Raises:
            RuntimeError: no step has begun.
        """
        if self._counts is None:
            raise RuntimeError(
                "balance_by_column: the model was trained outside of trainer.train(), which reads the "
                "batches of each optimizer step first: use eval mode or torch.no_grad() for other forwards"
            )
        return self._counts


def _unequal(number: Tensor, ranks: Tensor) -> ValueError:
    return ValueError(
        f"balance_by_column: {int(ranks)} ranks have {int(number)} micro-batches together in this optimizer "
        "step, and not equally many each, so they would wait for each other: give all ranks equally many "
        "batches (dataloader_drop_last=True, or shards of a stream with equally many rows)"
    )


def _without_column(column: str, batches: Tensor) -> ValueError:
    return ValueError(
        f"balance_by_column: {int(batches)} training batches of this step have no column {column!r}, so they "
        "would be trained without the balancer: every row of the training data needs its task. (The collator "
        "that the trainer had when balance_by_column was called must stay.)"
    )

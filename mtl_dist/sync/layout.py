"""What travels in one step: one buffer whose layout depends on the number of tasks only.

    loss sums n | counts n | upper triangle of the Gram n(n+1)/2 | fault counts n | fault ranks n | failure 2

Ranks may disagree about their data, but never about the number of bytes. The buffer is summed over ranks,
because everything in it adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats


@dataclass(frozen=True)
class Faults:
    """Which ranks sent a value that is not finite, or failed before they had any.

    Attributes:
        counts: `[n]`, number of ranks whose loss or gradient of the task was NaN or infinite.
        rank_sums: `[n]`, sum of the indices of those ranks: the rank itself where there is only one.
        failure: `[2]`, number of ranks that failed before this step's statistics, and the sum of their
            indices (see `Synchronizer.announce_failure`).
    """

    counts: Tensor
    rank_sums: Tensor
    failure: Tensor

    def first(self, later: Faults) -> Faults:
        """These faults, and those of `later` for tasks that had none yet.

        The first fault of a task is the cause, a later one only its consequence.
        """
        had = self.counts > 0
        return Faults(
            torch.where(had, self.counts, later.counts),
            torch.where(had, self.rank_sums, later.rank_sums),
            self.failure,
        )


class Layout:
    """Packs the statistics of n tasks into one buffer, and unpacks their sum.

    Args:
        num_tasks: n.
    """

    def __init__(self, num_tasks: int) -> None:
        self._num_tasks = num_tasks
        self._indices: Tensor | None = None

    def pack(
        self, local: LocalStats, rank: int, faulty: Tensor | None = None, failed: Tensor | None = None
    ) -> Tensor:
        """The buffer of one rank.

        Args:
            local: its statistics.
            rank: its index.
            faulty: `[n]` bool, tasks in which it saw a NaN or infinity; None: those that `local` shows.
            failed: scalar bool, whether it will raise an error; None: it will not.
        """
        if faulty is None:
            faulty = ~(local.loss_sums.isfinite() & local.gram.diagonal().isfinite())
        faults = faulty.to(local.loss_sums.dtype)
        failure = faults.new_zeros(2)
        if failed is not None:
            failure[0] = failed
            failure[1] = failed * rank
        row, column = self._triangle(local.gram.device)
        return torch.cat(
            [local.loss_sums, local.counts, local.gram[row, column], faults, faults * rank, failure]
        )

    def unpack(self, buffer: Tensor) -> tuple[LocalStats, Faults]:
        """Statistics and faults of one buffer, or of the sum of the buffers of all ranks."""
        n = self._num_tasks
        sizes = [n, n, n * (n + 1) // 2, n, n, 2]
        loss_sums, counts, triangle, fault_counts, rank_sums, failure = torch.split(buffer, sizes)
        row, column = self._triangle(buffer.device)
        gram = buffer.new_zeros(n, n)
        gram[row, column] = triangle
        gram[column, row] = triangle
        return LocalStats(loss_sums, counts, gram), Faults(fault_counts, rank_sums, failure)

    def _triangle(self, device: torch.device) -> Tensor:
        if self._indices is None or self._indices.device != device:
            self._indices = torch.triu_indices(self._num_tasks, self._num_tasks, device=device)
        return self._indices

"""From the statistics of one rank to those of all ranks: pack, one all-reduce, unpack.

No collective's shape or presence depends on a batch. The only exception is `gather_rows`: there the ranks
exchange the numbers of their rows first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.stats import LocalStats
from mtl_dist.sync.collectives import (
    Collectives,
    GroupCollectives,
    collective_device,
    is_distributed,
    is_part_of_world,
)
from mtl_dist.sync.layout import Faults, Layout
from mtl_dist.sync.timing import Stopwatch


class Synchronizer:
    """Sums statistics over the data-parallel ranks, on a process group of its own.

    It has its own group because the tap's collective runs between the engine's gradient buckets: where a
    task is absent on some ranks, the order of the two can differ between ranks. The group is made at the
    first step (`connect`), which is a collective. Without `torch.distributed` nothing is reduced.

    Attributes:
        num_tasks: n, which fixes the layout.
        group: the data-parallel group given by the user; None for all ranks.
        stopwatch: measures the collectives of a step, including the wait for the slowest rank.
        connected: whether the ranks have compared their settings.
        rank: index of this rank among those that are summed; 0 before `connect`.
        world_size: W, the number of ranks that are summed; 1 before `connect`.
        lost_group: whether it came out of a file, and had a group when it was saved.
    """

    def __init__(self, num_tasks: int, group: dist.ProcessGroup | None = None) -> None:
        self.num_tasks = num_tasks
        self.group = group
        self.stopwatch = Stopwatch()
        self.connected = False
        self.rank = 0
        self.world_size = 1
        self.lost_group = False
        self._layout = Layout(num_tasks)
        self._collectives: Collectives | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Synchronizer:
        """A synchronizer of the same group, which makes its own connection at its first step."""
        return Synchronizer(self.num_tasks, self.group)

    def __getstate__(self) -> dict[str, Any]:
        """Without group and connection, which belong to this process."""
        state = Synchronizer(self.num_tasks).__dict__
        return {**state, "lost_group": self.lost_group or is_part_of_world(self.group)}

    def connect(self, fingerprint: str) -> None:
        """Makes the group and compares `fingerprint` (tasks, rule, probe) over its ranks, once.

        Raises:
            ValueError: on every rank, where ranks differ; the message shows the fingerprint of each rank.
        """
        if self.connected:
            return
        if self._collectives is None and is_distributed():
            if self.lost_group:
                raise RuntimeError(
                    "mtl_dist: this balancer was saved with a process group, which a file cannot hold: call "
                    "attach again, or balancer.set_group(group)"
                )
            self._set(GroupCollectives(self.group))
        if self._collectives is not None:
            _check_agreement(self._collectives, fingerprint)
        self.connected = True

    def use(self, collectives: Collectives) -> None:
        """Sums with these collectives instead of those of a process group.

        Raises:
            RuntimeError: `connect` was already called.
        """
        if self.connected:
            raise RuntimeError("mtl_dist: virtual ranks must be set before the balancer's first step")
        self._set(collectives)

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group.

        Raises:
            RuntimeError: `connect` was already called, with another group.
        """
        if self.connected and group is not self.group:
            raise RuntimeError("mtl_dist: the group cannot change after the first step")
        self.group = group
        self.lost_group = False

    def reduce(
        self, local: LocalStats, faulty: Tensor | None = None, failed: Tensor | None = None
    ) -> tuple[LocalStats, Faults]:
        """Sum of `local` over all ranks, by one all-reduce of fixed layout, and the faults of all ranks.

        Args:
            local: statistics of this rank.
            faulty: `[n]` bool, tasks in which this rank saw a NaN or infinity; None: those that `local` shows
                (a Gram of summed gradients shows those of other ranks too).
            failed: scalar bool, whether this rank refuses its own input. The other ranks then raise too.
        """
        buffer = self._layout.pack(local, self.rank, faulty, failed)
        if self._collectives is not None:
            with self.stopwatch.running(buffer.device):
                self._collectives.all_reduce(buffer)
        return self._layout.unpack(buffer)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece of the sum of `rows` over all ranks, by one reduce-scatter.

        Inner products over a sharded axis add over ranks. So the Gram matrices of the pieces, summed by
        `reduce`, give that of the whole, and every rank holds the same bits of it.

        Args:
            rows: `[n, D]`, the same shape on every rank.

        Returns:
            `[n, ⌈D / W⌉]`, zero where the last piece is padded; `rows` itself in a single process.
        """
        collectives = self._collectives
        if collectives is None or collectives.world_size == 1:
            return rows
        n, length = rows.shape
        piece = -(-length // collectives.world_size)
        padded = rows.new_zeros(n, collectives.world_size * piece)
        padded[:, :length] = rows
        by_rank = padded.view(n, collectives.world_size, piece).transpose(0, 1).contiguous()
        mine = rows.new_empty(n, piece)
        with self.stopwatch.running(rows.device):
            collectives.reduce_scatter(mine, by_rank)
        return mine

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, by two all-gathers; the number of rows may differ by rank.

        The host waits for the numbers of rows.

        Args:
            rows: `[b, ...]`, the same shape on every rank except for b.

        Returns:
            `[Σ b, ...]`, the same on every rank; `rows` itself in a single process.
        """
        collectives = self._collectives
        if collectives is None or collectives.world_size == 1:
            return rows
        number = torch.tensor([len(rows)], device=rows.device)
        with self.stopwatch.running(rows.device):
            numbers = collectives.all_gather(number)
        lengths = torch.cat(numbers).tolist()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        with self.stopwatch.running(rows.device):
            everyone = collectives.all_gather(padded)
        return torch.cat([rows[:length] for rows, length in zip(everyone, lengths, strict=True)])

    def announce_failure(self) -> None:
        """Takes part in this step's all-reduce with the failure slot set, so that every rank raises.

        Waits at most 30 s. Where the others cannot come (they wait in a collective of the engine), this rank
        still raises its own error, and its launcher ends the others.
        """
        if self._collectives is None:
            return
        nothing = LocalStats.zeros(self.num_tasks, collective_device(self.group))
        failed = torch.ones((), dtype=torch.bool, device=nothing.counts.device)
        self._collectives.all_reduce_and_leave(self._layout.pack(nothing, self.rank, None, failed))

    def _set(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self.rank, self.world_size = collectives.rank, collectives.world_size


def _check_agreement(collectives: Collectives, fingerprint: str) -> None:
    everyone = collectives.gather_text(fingerprint)
    if any(other != fingerprint for other in everyone):
        listing = "\n".join(f"  rank {rank}: {other}" for rank, other in enumerate(everyone))
        raise ValueError(
            f"mtl_dist: ranks were given different balancers; make them the same on all ranks:\n{listing}"
        )

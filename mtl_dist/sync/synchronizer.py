"""From the statistics of one rank to those of all ranks: pack, one all-reduce, unpack.

No collective's shape or presence depends on a batch. The only exception is `gather_rows`: there the ranks
exchange the numbers of their rows first.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.stats import HOST, LocalStats
from mtl_dist.sync.agreement import Identity, compare_calls, compare_identities
from mtl_dist.sync.collectives import (
    Collectives,
    GroupCollectives,
    collective_device,
    is_part_of_world,
)
from mtl_dist.sync.group import group_is_gone, is_member, outside
from mtl_dist.sync.joins import JoinWatch
from mtl_dist.sync.layout import Call, Kind, Layout
from mtl_dist.sync.notice import Notice
from mtl_dist.sync.summed import Summed, aside
from mtl_dist.sync.timing import Stopwatch

_FIRST = Call(Kind.TRAINING, 0)


class Synchronizer:
    """Sums statistics over the data-parallel ranks, on a process group of its own.

    It has its own group because the tap's collective runs between the engine's gradient buckets: where a
    task is absent on some ranks, the order of the two can differ between ranks. Every training call asks
    whether there is a job (`connect`). The ranks meet at the first call that finds one, and again where
    `torch.distributed` was started anew. Without a job nothing is reduced.

    A copy, or what pickle brings back, has met nobody: it connects at its own first call.

    Args:
        num_tasks: n, which fixes the layout.
        group: the data-parallel group given by the user; None for all ranks. Held weakly.

    Raises:
        ValueError: `group` is no process group.

    Attributes:
        num_tasks: n.
        notice: a flag for all ranks, which travels with the statistics.
        stopwatch: measures the collectives of a step, including the wait for the slowest rank.
        started: whether there was a training call.
        news: a digest of the state that this rank loaded since the last training call; 0 if it loaded none.
        rank: index of this rank among those that are summed; 0 before `connect`.
        world_size: W, the number of ranks that are summed; 1 before `connect`.
    """

    def __init__(self, num_tasks: int, group: dist.ProcessGroup | None = None) -> None:
        self.num_tasks = num_tasks
        self._layout = Layout(num_tasks)
        self._meet_nobody()
        self._given: Any = None if group is None else _reference(group)

    def _meet_nobody(self) -> None:
        self.notice = Notice()
        self.stopwatch = Stopwatch()
        self.started = False
        self.news = 0
        self.rank = 0
        self.world_size = 1
        self._collectives: Collectives | None = None
        self._world: Any = None  # the job that the collectives belong to
        self._joins: JoinWatch | None = None

    def __getstate__(self) -> dict[str, Any]:
        group = None if self._given is None else self._given()
        is_part = self._given is not None and (group is None or is_part_of_world(group))
        return {"num_tasks": self.num_tasks, "given": is_part}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["num_tasks"])  # type: ignore[misc]
        self._given = _gone if state["given"] else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Synchronizer:
        twin = Synchronizer(self.num_tasks)
        twin._given = self._given
        return twin

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The data-parallel group; None for all ranks.

        Raises:
            RuntimeError: the group that was given is gone.
        """
        if self._given is None:
            return None
        group: dist.ProcessGroup | None = self._given()
        if group is None:
            raise group_is_gone()
        return group

    @property
    def device(self) -> torch.device:
        """Where the statistics of a rank without samples travel."""
        collectives = self._collectives
        return collectives.device if isinstance(collectives, GroupCollectives) else collective_device()

    def connect(self, identity: Callable[[], Identity]) -> bool:
        """Begins a training call: meets the other ranks if there are some that were not met.

        They compare `identity()`: settings and state.

        Returns:
            Whether the ranks met just now.

        Raises:
            ValueError: on every rank, where ranks differ; the message shows what each of them has.
            RuntimeError: the job or the group has ended, a rank does not come, or a join context is active.
        """
        if self.notice.listening:
            self.notice.settle()
        first, self.started = not self.started, True
        collectives = self._collectives
        if collectives is not None and self._world is None:  # virtual ranks
            if first:
                compare_identities(collectives.gather_text(identity().text()))
            return first
        world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        if world is None and collectives is None and self._given is None:
            return False
        if world is None:
            raise RuntimeError(_NO_JOB)
        if self._world is None or self._world() is not world:
            self._meet(world, identity())
            return True
        if self._joins is not None:
            self._joins.check()
        return False

    def _meet(self, world: dist.ProcessGroup, identity: Identity) -> None:
        joins = JoinWatch()
        joins.check()
        collectives = GroupCollectives(self.group or world)
        compare_identities(collectives.meet(identity.settings_text(), identity.text()))
        collectives.open()
        self._joins = joins if collectives.world_size > 1 else None
        self._set(collectives)
        self._world = weakref.ref(world)

    def use(self, collectives: Collectives) -> None:
        """Sums with these collectives instead of those of a process group.

        Raises:
            RuntimeError: there was a training call already.
        """
        if self.started:
            raise RuntimeError("mtl_dist: virtual ranks must be set before the balancer's first step")
        self._set(collectives)

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group.

        Raises:
            RuntimeError: the ranks have met in another group that still exists.
        """
        if self._given is not None and group is not None and self._given() is group:
            return
        if self._world is not None and self._is_alive():
            raise RuntimeError("mtl_dist: the group cannot change after the first step")
        self._given = None if group is None else _reference(group)
        if self._world is not None:
            self._collectives = self._world = None
            self.rank, self.world_size = 0, 1

    def _is_alive(self) -> bool:
        here = dist.is_initialized() and self._world() is dist.group.WORLD
        return here and (self._given is None or self._given() is not None)

    def reduce(
        self,
        local: LocalStats,
        faulty: Tensor | None = None,
        failed: Tensor | None = None,
        call: Call = _FIRST,
        *,
        with_gram: bool = True,
    ) -> Summed:
        """Sum of `local` over all ranks, by one all-reduce of fixed layout, and the faults of all ranks.

        Args:
            local: statistics of this rank.
            faulty: `[n]` bool, tasks in which this rank saw a NaN or infinity; None: those that `local` shows
                (a Gram of summed gradients shows those of other ranks too).
            failed: scalar bool, whether this rank refuses its own input. The other ranks then raise too.
            call: where this rank is; ranks that are elsewhere show in the faults (`Faults.strangers`).
            with_gram: whether the sum is asked for its Gram.
        """
        buffer = self._packed(local, faulty, failed, call)
        if self._collectives is not None:
            with self.stopwatch.running(buffer.device):
                self._collectives.start_all_reduce(buffer)()
        summed = Summed(self._layout, buffer, with_gram=with_gram)
        if self.notice.listening:
            self.notice.hear(summed)
        return summed

    def start_reduce(
        self, local: LocalStats, faulty: Tensor | None, failed: Tensor | None, call: Call, *, with_gram: bool
    ) -> Callable[[], Summed]:
        """As `reduce`, without waiting: returns a function that waits, and gives the sum on the host."""
        buffer = self._packed(local, faulty, failed, call)
        collectives = self._collectives
        if collectives is None or buffer.device.type != HOST:
            with aside(buffer):
                if collectives is not None:
                    collectives.start_all_reduce(buffer)()  # only its own stream waits
                return Summed(self._layout, buffer, with_gram=with_gram).here
        wait = collectives.start_all_reduce(buffer)

        def finish() -> Summed:
            with self.stopwatch.running(buffer.device):
                wait()
            return Summed(self._layout, buffer, with_gram=with_gram)

        return finish

    def start_counts(self, local: LocalStats, call: Call) -> Callable[[], Summed]:
        """Starts the sum of counts; returns a function that waits, and gives the sum where the counts are.

        On an accelerator only the current stream waits.
        """
        buffer = self._packed(local, None, None, call)
        collectives = self._collectives
        if collectives is None:
            return partial(Summed, self._layout, buffer, with_gram=False)
        arrived: torch.Event | None = None
        with aside(buffer):
            wait = collectives.start_all_reduce(buffer)
            if buffer.device.type != HOST:
                wait()
                arrived = torch.Event(buffer.device)
                arrived.record()

        def finish() -> Summed:
            with self.stopwatch.running(buffer.device):
                wait() if arrived is None else arrived.wait()
            return Summed(self._layout, buffer, with_gram=False)

        return finish

    def _packed(self, local: LocalStats, faulty: Tensor | None, failed: Tensor | None, call: Call) -> Tensor:
        call = call._replace(notice=self.notice.raised)
        return self._layout.pack(local, self.rank, call, faulty, failed)

    def explain_strangers(self, call: Call, state: Callable[[], str]) -> Exception | None:
        """The error where ranks met in different calls, or went on from different states.

        None where some loaded what the others have, so that the states are the same. The ranks tell each
        other where they are, and wait a short time for the answers.
        """
        assert self._collectives is not None
        return compare_calls(self._collectives.gather_text(f"{call}\n{state()}"))

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

    def announce_failure(self, call: Call) -> None:
        """Takes part in this call's all-reduce with the failure slot set, so that every rank raises.

        Waits at most 30 s. Where the others cannot come (they wait in a collective of the engine), this rank
        still raises its own error, and its launcher ends the others.
        """
        if self._collectives is None:
            return
        nothing = LocalStats.zeros(self.num_tasks, self.device)
        failed = torch.ones((), dtype=torch.bool, device=nothing.counts.device)
        unknown = replace(nothing, loss_sums=nothing.loss_sums + torch.nan)  # so that no rule learns from it
        self._collectives.all_reduce_and_leave(self._layout.pack(unknown, self.rank, call, None, failed))

    def _set(self, collectives: Collectives) -> None:
        self._collectives = collectives
        self.rank, self.world_size = collectives.rank, collectives.world_size


_NO_JOB = (
    "mtl_dist: this balancer belongs to a torch.distributed job that has ended (or was given a group of "
    "one), and alone this rank would train apart: call init_process_group() again, or evaluate in eval "
    "mode. To go on alone, put its state_dict() into a new Balancer without group="
)


def _reference(group: Any) -> Callable[[], dist.ProcessGroup | None]:
    return weakref.ref(group) if is_member(group) else _Outside(group)


class _Outside:
    """Stands for a group that this rank is not in."""

    def __init__(self, given: Any) -> None:
        self._given = given

    def __call__(self) -> dist.ProcessGroup | None:
        raise outside(self._given)


def _gone() -> None:
    """Stands for a group that pickle cannot bring along."""

"""The only file that names a collective: pack, one all-reduce, unpack.

No collective's shape or presence depends on a batch (`_layout.py`), but for the rows that `gather_rows`
gathers, whose numbers are exchanged first.
"""

from __future__ import annotations

import datetime
import weakref
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist._layout import Faults, Layout
from mtl_dist._stopwatch import Stopwatch
from mtl_dist.stats import LocalStats

# which of several ranks in one process the running thread is; None outside of `VirtualRanks.run`
virtual_rank: ContextVar[int | None] = ContextVar("mtl_dist_virtual_rank", default=None)

_FAREWELL_SECONDS = 30  # how long a failing rank waits for the others to hear of it
# renamed in torch 2.13, where the old name warns
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Wire(Protocol):
    """The collectives of W ranks.

    Attributes:
        rank: this rank's index.
        world_size: W.
    """

    rank: int
    world_size: int

    def all_reduce(self, buffer: Tensor) -> None:
        """Sums over ranks, in place."""
        ...

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        """Puts the sum over ranks of `by_rank[rank]` into `mine`; `by_rank` is `[W, ...]`."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, all of the same shape."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """The strings of all ranks."""
        ...

    def farewell(self, buffer: Tensor) -> None:
        """`all_reduce` by a rank that will raise, and does not wait for ranks that do not come."""
        ...


class _GroupWire:
    """The collectives of a process group made for the purpose from the ranks of `group` (None: all)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        # local synchronisation: other data-parallel groups make theirs elsewhere, if at all
        # held weakly: a Gloo group that outlives destroy_process_group() can hang at exit (torch 2.13)
        self._group = weakref.ref(dist.new_group(ranks, use_local_synchronization=True))
        self.rank = ranks.index(dist.get_rank())
        self.world_size = len(ranks)

    def all_reduce(self, buffer: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(buffer, group=self._live_group())

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        _reduce_scatter(mine.view(-1), by_rank.view(-1), group=self._live_group())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor, group=self._live_group())
        return everyone

    def gather_text(self, text: str) -> list[str]:
        everyone = [""] * self.world_size
        dist.all_gather_object(everyone, text, group=self._live_group())
        return everyone

    def farewell(self, buffer: Tensor) -> None:
        try:
            work = dist.all_reduce(buffer, group=self._live_group(), async_op=True)
            work.wait(timeout=datetime.timedelta(seconds=_FAREWELL_SECONDS))
        except RuntimeError:  # the others did not come, or went first: our own error says more
            return

    def _live_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup | None = self._group()
        if group is None:
            raise RuntimeError("mtl_dist: the process group was destroyed; make a new Balancer for a new one")
        return group


class Synchronizer:
    """Sums statistics over the data-parallel ranks, on a process group of its own.

    A group of its own, because the tap's collective runs among the engine's gradient buckets, and where a
    task is absent on some ranks the order of the two can differ between ranks. It is made at the first step
    (`connect`), which is a collective; without `torch.distributed` nothing is reduced.

    Attributes:
        num_tasks: n, which fixes the layout.
        group: the data-parallel group given by the user; None for all ranks.
        stopwatch: of the collectives of a step, waiting for the slowest rank included.
    """

    def __init__(self, num_tasks: int, group: dist.ProcessGroup | None = None) -> None:
        self.num_tasks = num_tasks
        self.group = group
        self.stopwatch = Stopwatch()
        self._layout = Layout(num_tasks)
        self._wire: Wire | None = None
        self._connected = False

    def connect(self, fingerprint: str) -> None:
        """Makes the group and compares `fingerprint` (tasks, rule, probe) over its ranks, once.

        Raises:
            ValueError: on every rank, where ranks differ; the message shows each rank's fingerprint.
        """
        if self._connected:
            return
        if self._wire is None and is_distributed():
            self._wire = _GroupWire(self.group)
        if self._wire is not None:
            self._check_agreement(self._wire, fingerprint)
        self._connected = True

    @property
    def rank(self) -> int:
        """This rank's index among those that are summed; 0 before `connect`."""
        return 0 if self._wire is None else self._wire.rank

    @property
    def world_size(self) -> int:
        """W, the number of ranks that are summed; 1 before `connect`."""
        return 1 if self._wire is None else self._wire.world_size

    def use(self, wire: Wire) -> None:
        """Sums over this wire instead of a process group.

        Raises:
            RuntimeError: `connect` was already called.
        """
        if self._connected:
            raise RuntimeError("mtl_dist: virtual ranks must be set before the balancer's first step")
        self._wire = wire

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group.

        Raises:
            RuntimeError: `connect` was already called.
        """
        if self._connected:
            raise RuntimeError("mtl_dist: the group cannot change after the first step")
        self.group = group

    def reduce(
        self, local: LocalStats, faulty: Tensor | None = None, failed: Tensor | None = None
    ) -> tuple[LocalStats, Faults]:
        """Sum of `local` over all ranks, by one all-reduce of fixed layout, and what was wrong with it.

        Args:
            local: this rank's statistics.
            faulty: `[n]` bool, tasks in which this rank saw a NaN or infinity; None: those that `local` shows
                (a Gram of summed gradients shows those of other ranks too).
            failed: scalar bool, whether this rank refuses its own input: the others then raise too.
        """
        buffer = self._layout.pack(local, self.rank, faulty, failed)
        if self._wire is not None:
            with self.stopwatch.running(buffer.device):
                self._wire.all_reduce(buffer)
        return self._layout.unpack(buffer)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece of the sum of `rows` over all ranks, by one reduce-scatter.

        Inner products over a sharded axis add over ranks, so a Gram matrix of the pieces, summed by `reduce`,
        is that of the whole, and every rank holds the same bits of it.

        Args:
            rows: `[n, D]`, the same shape on every rank.

        Returns:
            `[n, ⌈D / W⌉]`, zero where the last piece is padded; `rows` itself in a single process.
        """
        wire = self._wire
        if wire is None or wire.world_size == 1:
            return rows
        n, length = rows.shape
        piece = -(-length // wire.world_size)
        padded = rows.new_zeros(n, wire.world_size * piece)
        padded[:, :length] = rows
        by_rank = padded.view(n, wire.world_size, piece).transpose(0, 1).contiguous()
        mine = rows.new_empty(n, piece)
        with self.stopwatch.running(rows.device):
            wire.reduce_scatter(mine, by_rank)
        return mine

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks in rank order, by two all-gathers; the number of rows may differ by rank.

        The host waits for the numbers of rows.

        Args:
            rows: `[b, ...]`, the same shape on every rank but for b.

        Returns:
            `[Σ b, ...]`, the same on every rank; `rows` itself in a single process.
        """
        wire = self._wire
        if wire is None or wire.world_size == 1:
            return rows
        number = torch.tensor([len(rows)], device=rows.device)
        with self.stopwatch.running(rows.device):
            numbers = wire.all_gather(number)
        lengths = torch.cat(numbers).tolist()
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        with self.stopwatch.running(rows.device):
            everyone = wire.all_gather(padded)
        return torch.cat([rows[:length] for rows, length in zip(everyone, lengths, strict=True)])

    def announce_failure(self) -> None:
        """Takes part in this step's all-reduce with the failure slot set, so that every rank raises.

        Waits at most 30 s: where the others cannot come (they wait in a collective of the engine's), this
        rank still raises its own error, and its launcher ends them.
        """
        if self._wire is None:
            return
        nothing = LocalStats.zeros(self.num_tasks, wire_device(self.group))
        failed = torch.ones((), dtype=torch.bool, device=nothing.counts.device)
        self._wire.farewell(self._layout.pack(nothing, self.rank, None, failed))

    def _check_agreement(self, wire: Wire, fingerprint: str) -> None:
        everyone = wire.gather_text(fingerprint)
        if any(other != fingerprint for other in everyone):
            listing = "\n".join(f"  rank {rank}: {other}" for rank, other in enumerate(everyone))
            raise ValueError(
                f"mtl_dist: ranks were given different balancers; make them the same on all ranks:\n{listing}"
            )


def is_distributed() -> bool:
    """Whether this process is one of a `torch.distributed` job."""
    return dist.is_available() and dist.is_initialized()


def wire_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """The CPU where the group's backend takes tensors there, else this rank's accelerator."""
    if is_distributed() and "cpu" not in dist.get_backend_config(group):
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device("cpu")


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `tensor` over the ranks of `group` (None: all), a new tensor; a copy in a single process."""
    total = tensor.clone()
    if is_distributed():
        dist.all_reduce(total, group=group)
    return total

"""The collectives of W ranks: the only file that names a collective of torch.distributed."""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mtl_dist.sync.group import check_member, job_store, make_group, members, timeout_of
from mtl_dist.sync.meeting import Arrival, Board

# Which of several virtual ranks the running thread is; None outside of `VirtualRanks.run`.
virtual_rank: ContextVar[int | None] = ContextVar("mtl_dist_virtual_rank", default=None)

_LEAVE_SECONDS = 30.0  # how long a failing rank waits until the others have heard of it
_TELL_SECONDS = 10.0  # how long ranks that raise an error wait for what the others can say about it
# renamed in torch 2.13, where the old name warns
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Collectives(Protocol):
    """The collectives of W ranks.

    Attributes:
        rank: index of this rank.
        world_size: W.
    """

    rank: int
    world_size: int

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        """Begins to sum over ranks, in place; returns a function that waits for the sum."""
        ...

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        """Puts the sum over ranks of `by_rank[rank]` into `mine`; `by_rank` is `[W, ...]`."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape."""
        ...

    def gather_text(self, text: str) -> list[str | None]:
        """The texts of all ranks; None for ranks that did not come in time."""
        ...

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        """An all-reduce by a rank that will raise an error. It does not wait for ranks that do not come."""
        ...


class GroupCollectives:
    """The collectives of a process group of our own, made from the ranks of another.

    Args:
        parent: the data-parallel group.

    Attributes:
        device: where the statistics of a rank without samples travel.

    Raises:
        RuntimeError: `parent` was destroyed.
    """

    def __init__(self, parent: dist.ProcessGroup) -> None:
        ranks = members(parent)
        self._ranks = list(ranks)
        self._parent = weakref.ref(parent)
        self._timeout = timeout_of(parent)
        self.rank = ranks.index(dist.get_rank())
        self.world_size = len(ranks)
        self.device = collective_device(parent)
        self._board = Board(job_store(), ranks, self.rank)
        self._group: weakref.ref[dist.ProcessGroup] | None = None

    def meet(self, settings: str, text: str) -> list[str]:
        """The texts of all ranks, at their first meeting. Afterwards `open` makes the group.

        Args:
            settings: of the balancer, to recognise it where ranks were given different groups.
            text: of this rank.

        Raises:
            RuntimeError: a rank did not come.
            ValueError: ranks were given different groups.
        """
        arrival = Arrival(job_store(), self._ranks, dist.get_rank(), settings)
        seconds = self._timeout.total_seconds()

        def clash(absent: list[int]) -> str | None:
            if absent or self.rank or self.world_size == dist.get_world_size():
                return arrival.clash(self._ranks[place] for place in absent)
            return arrival.clash_outside(dist.get_world_size())

        texts = self._board.exchange(text, seconds, clash)
        absent = [rank for rank, text in zip(self._ranks, texts, strict=True) if text is None]
        if absent:
            raise RuntimeError(
                "mtl_dist: some ranks did not come to the balancer's first training call within "
                f"{seconds:g} s (the group's timeout): {'; '.join(map(arrival.whereabouts, absent[:8]))}. "
                f"Every rank of {_listed(self._ranks)} must call it; or give group=, the ranks that do"
            )
        return [text for text in texts if text is not None]

    def open(self) -> None:
        """Makes the group; all ranks of `meet` call it."""
        parent = self._parent()
        if self.world_size > 1 and parent is not None:
            # Held weakly: a Gloo group that outlives destroy_process_group() can hang at exit (torch 2.13).
            self._group = weakref.ref(make_group(parent, self._board.name))

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        """Begins to sum over ranks, in place; the host waits for Gloo, only the stream for NCCL."""
        if self.world_size == 1:
            return _nothing
        with self._in_words():
            work = dist.all_reduce(buffer, group=self._live_group(), async_op=True)

        def wait() -> None:
            with self._in_words():
                work.wait()

        return wait

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        """Puts the sum over ranks of `by_rank[rank]` into `mine`."""
        with self._in_words():
            _reduce_scatter(mine.view(-1), by_rank.view(-1), group=self._live_group())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks."""
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        with self._in_words():
            dist.all_gather(everyone, tensor, group=self._live_group())
        return everyone

    def gather_text(self, text: str) -> list[str | None]:
        """The texts of all ranks that come within a short time."""
        return self._board.exchange(text, min(_TELL_SECONDS, self._timeout.total_seconds()))

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        """An all-reduce, and a short wait."""
        if self.world_size == 1:
            return
        try:
            work = dist.all_reduce(buffer, group=self._live_group(), async_op=True)
            work.wait(timeout=min(self._timeout, datetime.timedelta(seconds=_LEAVE_SECONDS)))
        except RuntimeError:  # the others did not come, or left first: our own error says more
            return

    def _live_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup | None = None if self._group is None else self._group()
        if group is None:
            raise RuntimeError(
                "mtl_dist: the process group was destroyed inside a training call; make the call again"
            )
        return group

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if str(error).startswith("mtl_dist"):
                raise
            raise RuntimeError(
                f"mtl_dist: rank {self.rank} waited for other ranks of the balancer, and they did not come "
                f"within {self._timeout.total_seconds():g} s (the group's timeout) or have ended. Every rank "
                "must call the balancer in training mode equally often: look at the errors of the others, "
                f"and at the numbers of batches. torch says: {str(error).splitlines()[0]}"
            ) from error


def _nothing() -> None:
    """The wait for a sum that is already there."""


def _listed(ranks: list[int]) -> str:
    return str(ranks) if len(ranks) <= 16 else f"the {len(ranks)} ranks"


def is_distributed() -> bool:
    """Whether this process belongs to a `torch.distributed` job."""
    return dist.is_available() and dist.is_initialized()


def is_part_of_world(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` leaves out ranks of the job."""
    return group is not None and is_distributed() and dist.get_world_size(group) < dist.get_world_size()


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where the collectives of `group` take their tensors: the CPU if they can, else the accelerator.

    Raises the errors of `all_reduce_sum`.
    """
    check_member(group)
    if is_distributed() and "cpu" not in dist.get_backend_config(group):
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device("cpu")


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `tensor` over the ranks of `group` (None: all), a new tensor; a copy in a single process.

    Raises:
        ValueError: `group` is no process group.
        RuntimeError: this rank is not in it.
    """
    check_member(group)
    total = tensor.clone()
    if is_distributed():
        dist.all_reduce(total, group=group)
    return total

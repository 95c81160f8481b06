"""The collectives of W ranks: the only file that names a collective of torch.distributed."""

from __future__ import annotations

import datetime
import weakref
from contextvars import ContextVar
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# Which of several virtual ranks the running thread is; None outside of `VirtualRanks.run`.
virtual_rank: ContextVar[int | None] = ContextVar("mtl_dist_virtual_rank", default=None)

_LEAVE_SECONDS = 30  # how long a failing rank waits until the others have heard of it
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

    def all_reduce(self, buffer: Tensor) -> None:
        """Sums over ranks, in place."""
        ...

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        """Puts the sum over ranks of `by_rank[rank]` into `mine`; `by_rank` is `[W, ...]`."""
        ...

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape."""
        ...

    def gather_text(self, text: str) -> list[str]:
        """The strings of all ranks."""
        ...

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        """`all_reduce` by a rank that will raise an error. It does not wait for ranks that do not come."""
        ...


class GroupCollectives:
    """The collectives of a process group of our own, made from the ranks of `group` (None: all ranks)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        # Local synchronisation: other data-parallel groups make theirs elsewhere, if at all.
        # Held weakly: a Gloo group that outlives destroy_process_group() can hang at exit (torch 2.13).
        self._group = weakref.ref(dist.new_group(ranks, use_local_synchronization=True))
        self.rank = ranks.index(dist.get_rank())
        self.world_size = len(ranks)

    def all_reduce(self, buffer: Tensor) -> None:
        """Sums over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(buffer, group=self._live_group())

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        """Puts the sum over ranks of `by_rank[rank]` into `mine`."""
        _reduce_scatter(mine.view(-1), by_rank.view(-1), group=self._live_group())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks."""
        everyone = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(everyone, tensor, group=self._live_group())
        return everyone

    def gather_text(self, text: str) -> list[str]:
        """The strings of all ranks."""
        everyone = [""] * self.world_size
        dist.all_gather_object(everyone, text, group=self._live_group())
        return everyone

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        """`all_reduce`, and a short wait."""
        try:
            work = dist.all_reduce(buffer, group=self._live_group(), async_op=True)
            work.wait(timeout=datetime.timedelta(seconds=_LEAVE_SECONDS))
        except RuntimeError:  # the others did not come, or left first: our own error says more
            return

    def _live_group(self) -> dist.ProcessGroup:
        group: dist.ProcessGroup | None = self._group()
        if group is None:
            raise RuntimeError(
                "mtl_dist: the process group was destroyed; make a new Balancer for a new group"
            )
        return group


def is_distributed() -> bool:
    """Whether this process belongs to a `torch.distributed` job."""
    return dist.is_available() and dist.is_initialized()


def is_part_of_world(group: dist.ProcessGroup | None) -> bool:
    """Whether `group` leaves out ranks of the job."""
    return group is not None and is_distributed() and dist.get_world_size(group) < dist.get_world_size()


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where the collectives of `group` take their tensors: the CPU if they can, else the accelerator."""
    if is_distributed() and "cpu" not in dist.get_backend_config(group):
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    return torch.device("cpu")


def all_reduce_sum(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of `tensor` over the ranks of `group` (None: all), a new tensor; a copy in a single process."""
    total = tensor.clone()
    if is_distributed():
        dist.all_reduce(total, group=group)
    return total

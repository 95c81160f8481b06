"""What travels in one step: one buffer whose layout depends on the number of tasks only.

    loss sums n | counts n | upper triangle of the Gram n(n+1)/2 | fault counts n | fault ranks n | failure 2
    | notice 1 | codes 3 | their squares 3

Ranks may disagree about their data, but never about the number of bytes. The buffer is summed over ranks,
because everything in it adds. So do the codes x and their squares: ranks sent the same code exactly where
`W Σx² = (Σx)²`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats

_CODES = 3
_EXACT = 4096  # codes below this are compared exactly in float64, on up to 16384 ranks
_EXACT_FLOAT32 = 64  # and in float32 on 64 virtual ranks


class Kind(IntEnum):
    """Why ranks meet."""

    TRAINING = 1
    LATER = 2
    OBSERVE = 3
    CHECK = 4
    HELD = 5


class Call(NamedTuple):
    """The call of a balancer that a reduction belongs to.

    Attributes:
        kind: why the ranks meet.
        step: of the balancer.
        news: a digest of the state that this rank loaded since the last call; 0 if it loaded none.
        notice: whether this rank raises its flag (`Notice`).
    """

    kind: Kind
    step: int
    news: int = 0
    notice: bool = False

    def __str__(self) -> str:
        return f"{_NAMES[self.kind]} at step {self.step}"

    def codes(self, below: int) -> tuple[int, int, int]:
        """Three numbers smaller than `below`, from which two calls can be told apart."""
        room = below // 8
        return self.kind + 8 * (self.step % room), self.news % below, self.news // below % below


_NAMES = {
    Kind.TRAINING: "a training call",
    Kind.LATER: "the gradients of a training call",
    Kind.OBSERVE: "observe()",
    Kind.CHECK: "the check of a training call",
    Kind.HELD: "a call that holds the weights",
}


@dataclass(frozen=True)
class Faults:
    """Which ranks sent a value that is not finite, or failed before they had any.

    Attributes:
        counts: `[n]`, number of ranks whose loss or gradient of the task was NaN or infinite.
        rank_sums: `[n]`, sum of the indices of those ranks: the rank itself where there is only one.
        failure: `[2]`, number of ranks that failed before this step's statistics, and the sum of their
            indices (see `Synchronizer.announce_failure`).
        notice: `[1]`, number of ranks that raise their flag.
        calls: `[6]`, sums over ranks of the codes of their calls, and of the squares.
    """

    counts: Tensor
    rank_sums: Tensor
    failure: Tensor
    notice: Tensor
    calls: Tensor

    def strangers(self, world_size: int) -> Tensor:
        """Scalar bool: whether ranks met in different calls, or with different states just loaded."""
        codes, squares = torch.split(self.calls, _CODES)
        differ: Tensor = (world_size * squares != codes * codes).any()
        return differ & (self.failure[0] == 0)

    def first(self, later: Faults) -> Faults:
        """These faults, and those of `later` for tasks that had none yet.

        The first fault of a task is the cause, a later one only its consequence.
        """
        had = self.counts > 0
        return Faults(
            torch.where(had, self.counts, later.counts),
            torch.where(had, self.rank_sums, later.rank_sums),
            self.failure,
            self.notice,
            self.calls,
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
        self,
        local: LocalStats,
        rank: int,
        call: Call,
        faulty: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> Tensor:
        """The buffer of one rank.

        Args:
            local: its statistics.
            rank: its index.
            call: where it is.
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
        notice = faults.new_zeros(1)
        if call.notice:
            notice[0] = 1
        codes = faults.new_zeros(_CODES)
        exact = _EXACT if codes.dtype == torch.float64 else _EXACT_FLOAT32
        for place, code in enumerate(call.codes(exact)):
            if code:
                codes[place] = code  # a fill: the host does not wait for it
        row, column = self._triangle(local.gram.device)
        parts: Sequence[Tensor] = (
            local.loss_sums,
            local.counts,
            local.gram[row, column],
            faults,
            faults * rank,
        )
        return torch.cat([*parts, failure, notice, codes, codes * codes])

    def alone(
        self,
        local: LocalStats,
        call: Call,
        faulty: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> tuple[LocalStats, Faults]:
        """What `unpack` gives where there is one rank."""
        return self.unpack(self.pack(local, 0, call, faulty, failed))

    def unpack(self, buffer: Tensor) -> tuple[LocalStats, Faults]:
        """Statistics and faults of one buffer, or of the sum of the buffers of all ranks."""
        n = self._num_tasks
        sizes = [n, n, n * (n + 1) // 2, n, n, 2, 1, 2 * _CODES]
        loss_sums, counts, triangle, fault_counts, rank_sums, failure, notice, calls = torch.split(
            buffer, sizes
        )
        row, column = self._triangle(buffer.device)
        gram = buffer.new_zeros(n, n)
        gram[row, column] = triangle
        gram[column, row] = triangle
        return LocalStats(loss_sums, counts, gram), Faults(fault_counts, rank_sums, failure, notice, calls)

    def _triangle(self, device: torch.device) -> Tensor:
        if self._indices is None or self._indices.device != device:
            self._indices = torch.triu_indices(self._num_tasks, self._num_tasks, device=device)
        return self._indices

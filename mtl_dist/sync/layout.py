"""What travels in one step: one buffer whose layout depends on the number of tasks only.

    loss sums n | upper triangle of the Gram n(n+1)/2 | faults n | counts n | squares of the counts n
    | failure 1 | notice 1 | codes 3 | their squares 3

Ranks may disagree about their data, but never about the number of bytes. The buffer is summed over ranks,
because everything in it adds. So do counts and codes x and their squares: ranks sent the same x exactly where
`W Σx² = (Σx)²`. A fault is `1 + B rank` with a large B, so its sum tells how many ranks had it, and which one
where there is only one.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.stats import LocalStats

CODES = 3
_EXACT = 4096  # codes below this are compared exactly in float64, on up to 16384 ranks
_EXACT_FLOAT32 = 64  # and in float32 on 64 virtual ranks
BASE = 1 << 20  # of faults, more than there are ranks
BASE_FLOAT32 = 1 << 12


class Kind(IntEnum):
    """Why ranks meet."""

    TRAINING = 1
    LATER = 2
    OBSERVE = 3
    CHECK = 4
    HELD = 5
    COUNTS = 6
    LAGGED = 7


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
    Kind.COUNTS: "the counts of a training call (lag=1)",
    Kind.LAGGED: "the statistics of a training call (lag=1)",
}


class Layout:
    """Packs the statistics of n tasks into one buffer, and unpacks their sum.

    Attributes:
        num_tasks: n.
    """

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        # with a lag, both the device and the host have them, and a side stream may still read the device's
        self._constants: dict[torch.device, _Constants] = {}

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
        loss_sums, is_double = local.loss_sums, local.loss_sums.dtype == torch.float64
        fixed = self._constants_on(loss_sums)
        mark = 1.0 + (BASE if is_double else BASE_FLOAT32) * rank
        if faulty is None:
            size = loss_sums if local.gram is None else loss_sums + local.gram.diagonal()
            faulty = (size - size) != 0  # infinity minus infinity is NaN
        codes = call.codes(_EXACT if is_double else _EXACT_FLOAT32)
        tail = [0.0, float(call.notice), *codes, *(code * code for code in codes)]
        header: list[float] = []
        if local.known is not None:  # one transfer
            header = [*local.known, *(count * count for count in local.known)]
        on_host = torch.tensor([*header, *tail], dtype=loss_sums.dtype)
        known = on_host.to(loss_sums.device, non_blocking=True)
        if failed is not None:
            known = known.clone()
            known[len(header)] = failed * mark
        triangle = fixed.no_triangle if local.gram is None else local.gram.flatten().take(fixed.upper)
        counts = () if local.known is not None else (local.counts, local.counts * local.counts)
        faults = fixed.no_faults.masked_fill(faulty, mark)
        return torch.cat([loss_sums, triangle, faults, *counts, known])

    def unpack(self, buffer: Tensor, *, with_gram: bool = True) -> LocalStats:
        """The statistics in one buffer, or in the sum of the buffers of all ranks."""
        n = self.num_tasks
        loss_sums, triangle, _, counts, _ = torch.split(
            buffer, [n, n * (n + 1) // 2, n, n, len(buffer) - 3 * n - n * (n + 1) // 2]
        )
        gram = triangle.take(self._constants_on(buffer).places) if with_gram else None
        return LocalStats(loss_sums, counts, gram)

    def _constants_on(self, like: Tensor) -> _Constants:
        if like.device not in self._constants:
            self._constants[like.device] = _Constants.on(like, self.num_tasks)
        return self._constants[like.device]


class _Constants(NamedTuple):
    """What is the same in every step.

    Attributes:
        upper: `[n(n+1)/2]`, where the upper triangle is in a flat Gram.
        places: `[n, n]`, where each entry of a Gram is in its upper triangle.
        no_triangle: the triangle of a Gram that was not measured.
        no_faults: `[n]` zeros.
    """

    upper: Tensor
    places: Tensor
    no_triangle: Tensor
    no_faults: Tensor

    @classmethod
    def on(cls, like: Tensor, n: int) -> _Constants:
        row, column = torch.triu_indices(n, n)
        places = torch.zeros(n, n, dtype=torch.int64)
        places[row, column] = places[column, row] = torch.arange(len(row))
        device = like.device
        zeros = like.new_zeros(len(row)), like.new_zeros(n)
        return cls((row * n + column).to(device), places.to(device), *zeros)

"""What the ranks sent, summed, and what the sum says about them; values of a device read on the host.

A reader follows a batch through this file once: after the all-reduce.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtl_dist.stats import HOST, LocalStats
from mtl_dist.sync.layout import BASE, BASE_FLOAT32, CODES, Layout

_EQUAL = 1e-9  # relative error of a sum of squares of counts that are the same


class HostCopy:
    """A tensor on its way to the host. From an accelerator it is copied in the background.

    Args:
        tensor: to be read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.is_here = tensor.device.type == HOST
        self._event: torch.Event | None = None
        self._host = tensor
        if not self.is_here:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self._host.dtype

    def tensor(self) -> Tensor:
        """The tensor on the host. Where it comes from an accelerator, the host waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def values(self) -> Any:
        """Its values; waits as `tensor` does."""
        return self.tensor().tolist()


class Bad(NamedTuple):
    """Ranks that had a fault.

    Attributes:
        number: how many ranks.
        rank_sum: the sum of their indices: the rank itself where there is only one.
    """

    number: int
    rank_sum: int

    def __str__(self) -> str:
        return f"rank {self.rank_sum}" if self.number == 1 else f"{self.number} ranks"


@dataclass(frozen=True)
class Faults:
    """What the sum of all buffers says about the ranks that sent them; numbers on the host.

    Attributes:
        values: the summed buffer.
        num_tasks: n.
        is_double: whether it was summed in float64.
    """

    values: Sequence[float]
    num_tasks: int
    is_double: bool = True

    @cached_property
    def _tail(self) -> int:
        n = self.num_tasks
        return n + n * (n + 1) // 2

    def by_task(self) -> list[Bad]:
        """For each task, the ranks whose loss or gradient was NaN or infinite."""
        return [self._decoded(value) for value in self.values[self._tail : self._tail + self.num_tasks]]

    @property
    def failure(self) -> Bad:
        """The ranks that failed before this step's statistics (see `Synchronizer.announce_failure`)."""
        return self._decoded(self.values[self._tail + 3 * self.num_tasks])

    @property
    def notice(self) -> bool:
        """Whether a rank raises its flag (`Notice`)."""
        return self.values[self._tail + 3 * self.num_tasks + 1] > 0

    def losses_are_finite(self) -> bool:
        """Whether the losses of all ranks are."""
        return all(map(math.isfinite, self.values[: self.num_tasks]))

    def all_finite(self) -> bool:
        """Whether losses and Gram of all ranks are."""
        return all(map(math.isfinite, self.values[: self._tail]))

    def strangers(self, world_size: int) -> bool:
        """Whether ranks met in different calls, or with different states just loaded."""
        codes = self.values[-2 * CODES : -CODES]
        squares = self.values[-CODES:]
        differ = any(world_size * s != c * c for c, s in zip(codes, squares, strict=True))
        return differ and not self.failure.number

    def unequal_counts(self, world_size: int) -> list[int]:
        """The tasks whose counts were not the same on all ranks."""
        start, n = self._tail + self.num_tasks, self.num_tasks
        counts, squares = self.values[start : start + n], self.values[start + n : start + 2 * n]
        return [
            task
            for task, (c, s) in enumerate(zip(counts, squares, strict=True))
            if abs(world_size * s - c * c) > _EQUAL * c * c
        ]

    def _decoded(self, value: float) -> Bad:
        base = BASE if self.is_double else BASE_FLOAT32
        return Bad(int(value) % base, int(value) // base)


class Summed:
    """What the ranks sent, summed.

    Args:
        layout: of the buffer.
        buffer: the sum of the buffers of all ranks.
        with_gram: whether they hold a Gram.

    Attributes:
        total: the statistics.
        copy: of all values, on its way to the host.
    """

    def __init__(self, layout: Layout, buffer: Tensor, *, with_gram: bool) -> None:
        self.total: LocalStats = layout.unpack(buffer, with_gram=with_gram)
        self.copy = HostCopy(buffer)
        self._layout, self._buffer, self._with_gram = layout, buffer, with_gram

    @property
    def bad(self) -> Tensor:
        """Scalar bool: whether a loss or an entry of the Gram is NaN or infinite."""
        if self.copy.is_here:
            return torch.tensor(not self.faults.all_finite())
        n = self._layout.num_tasks
        whole = self._buffer[: n + n * (n + 1) // 2 if self._with_gram else n].sum()
        return (whole - whole) != 0  # infinity minus infinity is NaN

    def here(self) -> Summed:
        """The same on the host, which waits for the copy."""
        if self.copy.is_here:
            return self
        return Summed(self._layout, self.copy.tensor(), with_gram=self._with_gram)

    @cached_property
    def faults(self) -> Faults:
        """What the sum says about the ranks. On an accelerator the host waits for the copy."""
        return Faults(self.copy.values(), self._layout.num_tasks, self.copy.dtype == torch.float64)


_ASIDE: dict[torch.device, torch.Stream] = {}


@contextmanager
def aside(tensor: Tensor) -> Iterator[None]:
    """Inside, what is done with `tensor` on an accelerator runs beside the current stream, and after it.

    So the device waits for other ranks in a stream of its own, and the training goes on.
    """
    device = tensor.device
    if device.type == HOST:
        yield
        return
    if device not in _ASIDE:
        _ASIDE[device] = torch.Stream(device)
    stream = _ASIDE[device]
    stream.wait_stream(torch.accelerator.current_stream(device))
    tensor.record_stream(stream)  # its memory stays until the stream has passed here
    with stream:
        yield

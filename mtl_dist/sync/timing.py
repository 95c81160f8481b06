"""How long the collectives of a step took, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtl_dist.stats import Elapsed, Lap


class Stopwatch:
    """Collects laps until somebody takes them.

    Attributes:
        laps: since the last `take`.
    """

    def __init__(self) -> None:
        self.laps: list[Lap] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measures the block inside: on the host for the CPU, on the current stream elsewhere."""
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self.laps.append(time.perf_counter() - start)
            return
        before, after = (torch.Event(device, enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self.laps.append((before, after))

    def take(self) -> Elapsed:
        """The laps since the last call."""
        laps, self.laps = tuple(self.laps), []
        return Elapsed(laps)

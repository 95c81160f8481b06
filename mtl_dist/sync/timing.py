"""How long the collectives of a step took, measured without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtl_dist.stats import Elapsed, Lap


class Stopwatch:
    """Collects laps until somebody takes them."""

    def __init__(self) -> None:
        self._laps: list[Lap] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measures the block inside: on the host for the CPU, on the current stream elsewhere."""
        if device.type == "cpu":
            start = time.perf_counter()
            yield
            self._laps.append(time.perf_counter() - start)
            return
        before, after = (torch.Event(device, enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._laps.append((before, after))

    def take(self) -> Elapsed:
        """The laps since the last call."""
        laps, self._laps = tuple(self._laps), []
        return Elapsed(laps)

"""How long the collectives of a step took, without making the host wait for the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Lap = float | tuple[torch.Event, torch.Event]


@dataclass(frozen=True)
class Elapsed:
    """A measured time.

    Attributes:
        laps: seconds on the host, or the events before and after on an accelerator's stream.
    """

    laps: tuple[Lap, ...] = ()

    def seconds(self) -> float:
        """The sum of the laps. Waits for their events, so read it when the step is long over."""
        return sum(map(_seconds, self.laps))


class Stopwatch:
    """Adds up laps until they are taken."""

    def __init__(self) -> None:
        self._laps: list[Lap] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Measures what is inside: on the host for the CPU, on the current stream elsewhere."""
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


def _seconds(lap: Lap) -> float:
    if isinstance(lap, float):
        return lap
    before, after = lap
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3

"""Queues of the stand-in device: what each knows of the others, and memory that they use in order."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

NAME = "far"
Clock = Counter["Stream"]


class Fault(RuntimeError):
    """What an accelerator would refuse, or would get wrong."""


class Stream:
    """A queue of the device. Its clock says how far it knows each queue, itself included."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.device = f"{NAME}:0"
        self.clock: Clock = Counter()

    def tick(self) -> int:
        self.clock[self] += 1
        return self.clock[self]

    def wait_stream(self, other: Stream) -> None:
        self.clock |= other.clock

    def wait_event(self, event: Event) -> None:
        self.clock |= event.clock

    def synchronize(self) -> None:
        HOST.clock |= self.clock

    def __enter__(self) -> Stream:
        streams().append(self)
        return self

    def __exit__(self, *_: object) -> None:
        streams().pop()


class Event:
    """A mark in a queue."""

    def __init__(self, device: Any = None, **_: Any) -> None:
        self.clock: Clock = Counter()

    def record(self, stream: Stream | None = None) -> None:
        self.clock = Counter((stream or current()).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current()).wait_event(self)

    def synchronize(self) -> None:
        HOST.clock |= self.clock

    def elapsed_time(self, _: Event) -> float:
        return 1.0


MAIN, HOST = Stream(), Stream()
_OF_THREAD = threading.local()


def streams() -> list[Stream]:
    if not hasattr(_OF_THREAD, "streams"):
        _OF_THREAD.streams = [MAIN]
    return _OF_THREAD.streams


def current(_: Any = None) -> Stream:
    return streams()[-1]


class Memory:
    """What views share: where it was allocated, written and read."""

    def __init__(self, stream: Stream, faults: list[str]) -> None:
        self.stream = self.writer = stream
        self.written = 0
        self.uses: Clock = Counter()
        self.recorded = {stream}
        self.faults = faults

    def __del__(self) -> None:
        for stream, time in self.uses.items():
            if stream not in self.recorded and max(self.stream.clock[stream], HOST.clock[stream]) < time:
                self.faults.append("memory is freed while another stream uses it: record_stream")

    def read(self, by: Stream) -> None:
        if by.clock[self.writer] < self.written:
            copy, other = "the host reads a copy that has not been", "a stream reads what another one has not"
            raise Fault(f"{copy if by is HOST else other} written yet")

    def use(self, by: Stream, time: int, *, writes: bool) -> None:
        if writes:
            if any(by.clock[stream] < used for stream, used in self.uses.items()):
                raise Fault("a stream writes what another one still reads")
            self.writer, self.written = by, time
        self.uses[by] = time

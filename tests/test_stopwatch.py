"""Time in collectives: on the host on a CPU, by events elsewhere, nothing where nothing is sent."""

from __future__ import annotations

import time

import torch

from mtl_dist import Balancer
from mtl_dist.stats import Elapsed
from mtl_dist.sync import Stopwatch, timing
from mtl_dist.weighting import Equal

CPU = torch.device("cpu")


def test_laps_add_until_they_are_taken():
    watch = Stopwatch()
    for _ in range(2):
        with watch.running(CPU):
            time.sleep(0.01)
    assert 0.02 <= watch.take().seconds() < 1
    assert watch.take() == Elapsed()
    assert Elapsed().seconds() == 0


class Event:
    """What an accelerator's event does, with a clock of one second a record."""

    recorded = 0
    log: list[str] = []

    def __init__(self, device, enable_timing):
        assert enable_timing

    def record(self):
        Event.recorded += 1
        self.at = Event.recorded
        Event.log.append("record")

    def synchronize(self):
        Event.log.append("wait")

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_an_accelerator_is_waited_for_when_the_time_is_read(monkeypatch):
    monkeypatch.setattr(timing.torch, "Event", Event)
    watch = Stopwatch()
    with watch.running(torch.device("cuda")):
        pass
    taken = watch.take()
    assert Event.log == ["record", "record"]
    assert taken.seconds() == 1
    assert Event.log[-1] == "wait"


def test_a_single_process_sends_nothing():
    balancer = Balancer(["a"], Equal())
    balancer({"a": torch.ones((), requires_grad=True)})
    assert balancer.report.sync.seconds() == 0

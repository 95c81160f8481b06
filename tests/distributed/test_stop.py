"""Save on signal: every rank stops after the same step, whichever rank hears the signal."""

from __future__ import annotations

import os
import signal
import threading

import pytest
import torch
from launcher import succeed

from mtl_dist import Balancer
from mtl_dist.integrations.stop import SaveOnSignal
from mtl_dist.weighting import Equal


@pytest.mark.parametrize(
    ("case", "receiver"), [("probe", 0), ("probe", 1), ("probe", -1), ("tap", 1), ("check", 1), ("window", 1)]
)
def test_all_ranks_stop_after_the_same_step(case: str, receiver: int) -> None:
    said = sorted(succeed("stop.py", 2, case, str(receiver)).split("\n"))[-2:]
    name = "SIGUSR1" if case == "probe" else "SIGTERM"
    expected = (3, 75) if receiver >= 0 else (None, 0)
    step, status = expected
    assert said == [f"{rank} {step} {name if rank == receiver else None} {status}" for rank in (0, 1)]


def step(balancer: Balancer) -> None:
    balancer({"a": torch.ones((), requires_grad=True)})


def test_one_process() -> None:
    balancer = Balancer(["a"], Equal())
    with SaveOnSignal(balancer) as stop:
        step(balancer)
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert not stop.requested(), "before the step in which all ranks hear it"
        step(balancer)
        assert stop.requested()
    assert (stop.signal, stop.exit_status) == ("SIGTERM", 75)
    with SaveOnSignal(balancer) as again:
        step(balancer)
        assert not again.requested(), "an earlier request is not this one's"


def test_signals_are_given_back_as_they_were() -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with SaveOnSignal(Balancer(["a"], Equal()), [signal.SIGUSR1]):
            assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_another_thread_is_told_where_to_enter_it() -> None:
    errors = []

    def enter() -> None:
        try:
            with SaveOnSignal(Balancer(["a"], Equal())):
                pass
        except RuntimeError as error:
            errors.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert errors == ["SaveOnSignal: Python delivers signals to the main thread; enter it there"]

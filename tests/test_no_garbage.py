"""A step leaves no tensor to Python's garbage collector: on a GPU their memory stays taken until it runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.gpu.core import PROBES
from benchmarks.gpu.model import make, rule, stepper
from mtl_dist import RULES, Needs
from mtl_dist.weighting import MGDA, Smooth

CPU = torch.device("cpu")
SETTINGS: dict[str, dict[str, Any]] = {
    "check": {"check": True},
    "window": {"window": 2},
    "skip": {"on_nonfinite": "skip"},
    "hold": {"on_nonfinite": "hold"},
    "equal counts": {"counts": "equal"},
}


@pytest.fixture(autouse=True, scope="module")
def collected_by_hand() -> Iterator[None]:
    gc.collect()
    gc.disable()
    gc.freeze()  # what was there before is not looked through again
    yield
    gc.unfreeze()
    gc.enable()


def garbage(**arguments: Any) -> list[torch.Tensor]:
    """The tensors in reference cycles after some steps."""
    step = stepper(make(device=CPU, **arguments), CPU)
    for number in range(9):  # at the 8th step a balancer looks back
        step(number)
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for number in range(3):
            step(number)
        gc.collect()
        return [one for one in gc.garbage if isinstance(one, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_a_cycle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_dist.balancer.lagged_step import LaggedStep

    original = LaggedStep.finish

    def keeps_itself(self: Any) -> None:
        original(self)
        self.itself = self

    monkeypatch.setattr(LaggedStep, "finish", keeps_itself)
    assert garbage(rule=MGDA(), lag=1)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("lag", [0, 1])
def test_no_rule_leaves_a_cycle(name: str, lag: int) -> None:
    if lag and RULES[name].own_batch:
        lag = 0  # such rules refuse a lag
    chosen = rule(name)
    assert garbage(rule=chosen, lag=lag, losses_only=chosen.needs is Needs.LOSSES) == []


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("lag", [0, 1])
def test_no_probe_leaves_a_cycle(name: str, lag: int) -> None:
    lag = 0 if "reevaluate" in name else lag  # with a lag the heads run once
    assert garbage(rule=Smooth(MGDA(), 0.5), probe=PROBES[name](), lag=lag) == []


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("lag", [0, 1])
def test_no_setting_leaves_a_cycle(name: str, lag: int) -> None:
    settings = SETTINGS[name]
    if settings.get("on_nonfinite") == "skip" or "counts" in settings:
        lag = int("counts" in settings)  # skip refuses a lag, equal counts need one
    assert garbage(rule=MGDA(), lag=lag, **settings) == []

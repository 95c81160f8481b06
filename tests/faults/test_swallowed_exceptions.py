"""An exception that the caller goes on from (a batch too large, a broken file) blocks no later step."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from mtl_dist import FeatureProbe, FeatureTap, ParameterProbe
from mtl_dist.weighting import InverseGradNorm, Smooth
from tests.faults.small import Net, batch, net

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "a lag": {"lag": 1},
    "a window": {"window": 2},
    "a check": {"check": True},
    "counts told ahead": {"lag": 1},
}
PROBES = {"feature": FeatureProbe(), "tap": FeatureTap(), "parameter": ParameterProbe()}


class Broken(Exception):
    """Raised by the caller's own code."""


def broken(*given: Any) -> Tensor:
    raise Broken


def fail(model: Net, place: str, told: bool) -> None:
    """A step that does not come to its end."""
    if told:
        model.balancer.expect({"a": 1, "b": 1})
    parts = {"trunk": model.trunk, "head": model.heads["b"]}
    hook = parts[place].register_forward_pre_hook(broken) if place in parts else None
    with suppress(Broken):
        loss = model(batch(9))
        assert place in ("between", "backward")
        if place == "backward":
            loss.register_hook(broken)
            loss.backward()
            raise AssertionError("the hook did not run")
    if hook is not None:
        hook.remove()
    model.zero_grad()


@pytest.mark.parametrize("place", ["trunk", "head", "between", "backward"])
@pytest.mark.parametrize(
    ("setting", "probe"),
    [pair for pair in itertools.product(SETTINGS, PROBES) if pair != ("a window", "parameter")],  # refused
)
def test_later_steps_work(setting: str, probe: str, place: str) -> None:
    weights, told = [], setting == "counts told ahead"
    for fails in (False, True):
        model = net(Smooth(InverseGradNorm(), 0.5), probe=PROBES[probe], **SETTINGS[setting])
        for step in range(6):
            if fails and step == 2:
                fail(model, place, told)
            if told:
                model.balancer.expect({"a": 1, "b": 1})
            model.zero_grad()
            model(batch(step)).backward()
        weights.append(torch.tensor(list(model.balancer.weights.values())))
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert weights[1].isfinite().all()
    if place in ("trunk", "head"):  # no statistics, so the rule learnt nothing
        assert torch.equal(*weights)

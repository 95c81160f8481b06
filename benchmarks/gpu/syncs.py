"""Part `syncs`: how often a step makes the host wait for the device, for every rule and probe.

With `lag=1` never: `torch.cuda.set_sync_debug_mode("error")` surrounds whole training steps. With `lag=0` the
waits are counted; rules whose problem is solved on the host wait once. On a CPU nothing waits; there the
reads are counted that would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.counting import counting
from benchmarks.gpu.core import PROBES
from benchmarks.gpu.machine import wait
from benchmarks.gpu.model import make, rule, stepper
from benchmarks.gpu.record import Found, Record, quiet
from mtl_dist import RULES, Needs

WARMUP = 10  # steps; a balancer looks at its numbers at the 8th, 16th, 32nd, ...
MEASURED = 4


def checks(device: torch.device, *, brief: bool = False) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Every rule with its usual probe, and every probe with one rule."""
    yield "plain", partial(waits, device, None, None, 0)
    names = ["mgda", "inverse_loss"] if brief else sorted(RULES)
    for lag in (0, 1):
        for name in names:
            if lag and RULES[name].own_batch:
                continue
            yield f"{name}, lag={lag}", partial(waits, device, name, None, lag)
        for probe in PROBES:
            if not (lag and "reevaluate" in probe):
                yield f"{probe}, mgda, lag={lag}", partial(waits, device, "mgda", probe, lag)


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """All of them."""
    with quiet():
        for name, check in checks(device, brief=brief):
            record.run(name, check)


def waits(device: torch.device, name: str | None, probe: str | None, lag: int) -> Found:
    """Waits per step, after a warm-up; raises where a step with `lag=1` waits."""
    chosen = None if name is None else rule(name)
    losses_only = chosen is not None and probe is None and chosen.needs is Needs.LOSSES
    made = None if probe is None else PROBES[probe]()
    settings = {"lag": lag, "counts": "equal"} if lag else {}
    net = make(chosen, made, device=device, dtype=torch.float32, losses_only=losses_only, **settings)
    step = stepper(net, device, torch.float32)
    for number in range(WARMUP):
        step(number)
    wait(device)
    if device.type != "cuda":
        return {"reads": reads(step)}
    if lag or name is None:
        with sync_mode("error"):
            for number in range(MEASURED):
                step(number)
        return {"waits": 0.0}
    with sync_mode("warn"), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(MEASURED):
            step(number)
    return {"waits": sum("synchroniz" in str(warning.message) for warning in told) / MEASURED}


def reads(step: Callable[[int], Tensor]) -> float:
    """Host reads of a step, and those of what is on the host anyway."""
    with counting() as counts:
        for number in range(MEASURED):
            step(number)
    return counts.reads / MEASURED


class sync_mode:  # used as a function, like torch.no_grad
    """What torch does about a call that waits for the device: "warn" or "error"."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode(self.mode)

    def __exit__(self, *error: object) -> None:
        torch.cuda.set_sync_debug_mode("default")

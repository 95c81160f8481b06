"""Trains on the stand-in device and on the CPU: `stand_in_run.py OUT`, in a process without backwards before.

Writes `OUT`: by case, the largest difference of weights, losses and gradients, what the host waited for in
the last step, and what was wrong. Statistics are summed over two ranks that hold the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import stand_in
import torch
from stand_in import Device
from stand_in_net import TASKS, Net, batch
from subjects import build
from torch import Tensor

from mtl_dist import (
    RULES,
    Balancer,
    Engine,
    FeatureProbe,
    FeatureTap,
    ParameterProbe,
    Rule,
    SharedLayerProbe,
    stats,
)
from mtl_dist.losses import tasks
from mtl_dist.stats import TaskStats
from mtl_dist.sync import layout, summed, synchronizer
from mtl_dist.weighting import FAMO, MGDA, InverseGradNorm, InverseLoss, State

Make = Callable[[], Balancer]
Case = Callable[[], list[Any]]


def trained(
    device: Device | None,
    make: Make,
    form: str,
    steps: int,
    dropout: float,
    after: Any = None,
) -> tuple[list[Tensor], list[str]]:
    """What it learnt, on the host, and what the host waited for in the last step."""
    with contextlib.nullcontext() if device is None else device.allowed():
        net = Net(make(), form, dropout)
        if device is not None:
            device.module(net)
            torch.manual_seed(0)
    waits: list[str] = []
    totals = []
    for step in range(steps):
        given = batch(step)
        if device is not None:
            given = tuple(map(device.far, given))
            device.waits.clear()
        total = net(*given)
        (total if after is None else after(net, total, given)).backward()
        totals.append(total.detach())
        if device is not None:
            waits = list(device.waits)
    with contextlib.nullcontext() if device is None else device.allowed():
        report = net.balancer.report
        gram = report.stats.gram
        learnt = [report.weight_vector, report.stats.losses, *([] if gram is None else [gram])]
        learnt += [torch.stack(totals), *(p.grad for p in net.parameters() if p.grad is not None)]
        return [value.detach().cpu().double() for value in learnt], waits


def compared(
    make: Make,
    form: str = "heads",
    steps: int = 2,
    dropout: float = 0.0,
    after: Any = None,
    has_double: bool = True,
) -> list[Any]:
    with single_precision(not has_double), Device(has_double=has_double) as device:
        got, waits = trained(device, make, form, steps, dropout, after)
    # on the device random numbers are others, so with dropout there is nothing to compare
    expected = got if dropout else trained(None, make, form, steps, dropout, after)[0]
    errors = [error(e, g) for e, g in zip(expected, got, strict=True)]
    return [max(errors), waits, *device.faults]


@contextlib.contextmanager
def single_precision(on: bool) -> Iterator[None]:
    """The device is one of those that have no float64, as "mps" is, wherever the library asks."""
    own = stats.stats_dtype.__code__
    tasks._on_device.cache_clear()
    if on:
        stats.stats_dtype.__code__ = as_on_mps.__code__
    try:
        yield
    finally:
        stats.stats_dtype.__code__ = own
        tasks._on_device.cache_clear()


def as_on_mps(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "far" else torch.float64


def error(expected: Tensor, got: Tensor) -> float:
    assert expected.shape == got.shape
    return float((expected - got).abs().max() / expected.abs().max().clamp(min=1e-12))


def balancer(rule: Rule | None = None, **settings: Any) -> Make:
    return lambda: Balancer(TASKS, MGDA() if rule is None else rule, **settings)


def observed(net: Net, total: Tensor, given: Any) -> Tensor:
    net.balancer.observe({task: (i + 1) * total.detach() for i, task in enumerate(TASKS)})
    return total


def expected_first(net: Net, total: Tensor, _: Any) -> Tensor:
    net.balancer.expect(dict.fromkeys(TASKS, 1))
    return total


def again_held(net: Net, total: Tensor, given: Any) -> Tensor:
    with net.balancer.held():
        return net(*given) + total


def evaluated(net: Net, total: Tensor, given: Any) -> Tensor:
    with torch.no_grad():
        net(*given)
    return total


def noticed(net: Net, total: Tensor, _: Any) -> Tensor:
    notice = net.balancer.notice
    assert net.balancer.uses.calls < 3 or notice.heard
    notice.listening = notice.raised = True
    return total


def reloaded(net: Net, total: Tensor, _: Any) -> Tensor:
    with allowed():
        if net.balancer.uses.calls > 1:  # it forgets the report
            return total
        net.balancer.load_state_dict(net.balancer.state_dict())
    return total


def with_sums_on_device(case: Case) -> list[Any]:
    """The group sums tensors of the device alone, as NCCL does."""
    place = property(lambda self: torch.device("far" if stand_in.DEVICE else "cpu"))
    with patch.object(synchronizer.Synchronizer, "device", place):
        return case()


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    with stand_in.DEVICE[-1].allowed() if stand_in.DEVICE else contextlib.nullcontext():
        yield


PROBES = {
    "FeatureProbe": FeatureProbe(),
    "FeatureProbe(reevaluate)": FeatureProbe(reevaluate=True),
    "FeatureTap": FeatureTap(),
    "SharedLayerProbe(exact)": SharedLayerProbe(form="exact", bias=True),
    "SharedLayerProbe(kernel)": SharedLayerProbe(form="kernel"),
    "SharedLayerProbe(sketch)": SharedLayerProbe(form="exact", sketch=8),
    "ParameterProbe": ParameterProbe(),
    "ParameterProbe(sketch)": ParameterProbe(sketch=16, bucket=64),
}


def rules(lag: int) -> Iterator[tuple[str, Case]]:
    for name in sorted(RULES):
        if lag and RULES[name].own_batch:
            continue
        make = lambda name=name: Balancer(TASKS, build(name, TASKS), lag=lag)  # noqa: E731
        yield name, lambda make=make: compared(make)


def probes(lag: int) -> Iterator[tuple[str, Case]]:
    for name, probe in PROBES.items():
        make = balancer(InverseGradNorm(), probe=probe, lag=lag)
        yield name, lambda make=make: compared(make)
        if not isinstance(probe, FeatureTap):
            yield f"{name}, mixture", lambda make=make: compared(make, "mixture")
        if isinstance(probe, (FeatureProbe, FeatureTap)):
            yield f"{name}, dropout", lambda make=make: compared(make, dropout=0.5)
        if isinstance(probe, (FeatureProbe, ParameterProbe)):
            yield f"{name}, one function", lambda make=make: compared(make, "one function")


def settings(lag: int) -> Iterator[tuple[str, Case]]:
    scaled = Engine(scaled=lambda one: 8 * one)
    grams, given = balancer(lag=lag), balancer(probe=ParameterProbe(), lag=lag)
    tap, windows = balancer(probe=FeatureTap(), lag=lag), balancer(window=2, lag=lag)
    held = balancer(on_nonfinite="hold", lag=lag)
    based = balancer(base={"task0": 1.0, "task1": 2.0, "task2": 3.0}, lag=lag)
    single = {"has_double": False}
    yield "nine steps", lambda: compared(grams, steps=9)  # what watches look at
    yield "nine steps, held where not finite", lambda: compared(held, steps=9)
    yield "losses", lambda: compared(balancer(InverseLoss(), lag=lag), "losses")
    yield "parameters=", lambda: compared(given, "losses, parameters")
    yield "base weights", lambda: compared(based, "mixture")
    counted = ("counts on the device", "counts on the host", "some of both")
    for form in ("mixture, mask", "an absent task", "no sample", *counted):
        yield form, lambda form=form: compared(grams, form)
    yield "window", lambda: compared(windows, steps=4)
    yield "a notice", lambda: compared(grams, steps=3, after=noticed)
    yield "observe", lambda: compared(balancer(FAMO(feedback="after"), lag=lag), after=observed)
    yield "held", lambda: compared(grams, after=again_held)
    yield "evaluation", lambda: compared(grams, after=evaluated)
    yield "a state loaded", lambda: compared(grams, after=reloaded)
    yield "loss scale", lambda: compared(lambda: told(scaled, grams()))
    for form in ("heads", "one function", "mixture, mask"):
        yield f"no float64, {form}", lambda form=form: compared(grams, form, **single)
    yield "no float64, FeatureTap", lambda: compared(tap, **single)
    yield "no float64, window", lambda: compared(windows, steps=4, **single)
    yield "no float64, held", lambda: compared(grams, after=again_held, **single)
    yield "no float64, evaluation", lambda: compared(grams, after=evaluated, **single)
    yield "no float64, ParameterProbe", lambda: compared(given, **single)
    if lag:
        yield "expect, counts on the host", lambda: compared(grams, after=expected_first)
        yield "expect", lambda: with_sums_on_device(lambda: compared(grams, after=expected_first))
        yield "equal counts", lambda: compared(balancer(counts="equal", lag=lag), steps=9)
    else:
        yield "skip", lambda: compared(balancer(on_nonfinite="skip"))


def alarms(lag: int) -> Iterator[tuple[str, Case]]:
    """What is wrong with the second batch, which the host hears of later."""

    def nan(x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return x, y * torch.nan, ids, mask

    def unknown(x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return x, y, ids + 1, mask

    yield "alarm of a NaN", lambda: alarmed(balancer(lag=lag), "heads", nan)
    yield "alarm of an unknown task", lambda: alarmed(balancer(lag=lag), "mixture", unknown)


def alarmed(make: Make, form: str, spoil: Any) -> list[Any]:
    with Device() as device:
        with device.allowed():
            net = device.module(Net(make(), form, 0.0))
        waits: list[str] = []
        for step in range(4):
            device.waits.clear()
            given = map(device.far, spoil(*batch(step)) if step == 1 else batch(step))
            try:
                total = net(*given)
            except ValueError as error:
                return [0.0, waits, *device.faults, f"in call {step}: {error}"]
            total.backward()
            waits += device.waits if step else []
    return [0.0, waits, "no alarm"]


# ---- mistakes that must show --------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads(Rule):
    """A rule that asks for a number."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        return stats.losses / stats.losses.sum().item(), state


@dataclass(frozen=True)
class Mixes(Rule):
    """A rule that makes a tensor without saying where."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        return stats.losses * torch.ones(len(stats.losses)), state


@dataclass(frozen=True)
class Doubles(Rule):
    """A rule that makes float64 where it may not be."""

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        return stats.losses.double().softmax(0), state


def of_one_device(self: layout.Layout, like: Tensor) -> Any:
    """The constants move between device and host, and those of the device are freed in use."""
    for device in self._constants.keys() - {like.device}:
        del self._constants[device]
    return self._constants.setdefault(like.device, layout._Constants.on(like, self.num_tasks))


def freed_early() -> list[Any]:
    with Device() as device:
        memory, side = device.far(torch.ones(3)), stand_in.Stream()
        side.wait_stream(stand_in.current())
        with side:
            memory + 1
        del memory
    return [0.0, [], *device.faults]


def planted() -> Iterator[tuple[str, Case]]:
    lagged = balancer(lag=1)

    def patched(owner: Any, name: str, value: Any, after: Any = None) -> Case:
        def case() -> list[Any]:
            with patch.object(owner, name, value):
                return compared(lagged, after=after)

        return case

    @contextlib.contextmanager
    def too_early(tensor: Tensor) -> Iterator[None]:
        with summed._ASIDE.setdefault(tensor.device, stand_in.Stream()):
            yield

    yield "planted: a rule reads", lambda: compared(balancer(Reads()))
    yield "planted: a rule mixes devices", lambda: compared(balancer(Mixes()))
    yield "planted: a rule needs float64", lambda: compared(balancer(Doubles()), has_double=False)
    yield "planted: a copy is read too early", patched(summed.HostCopy, "tensor", lambda self: self._host)
    yield "planted: the side stream does not wait", patched(synchronizer, "aside", too_early)
    not_waiting = patched(stand_in.Event, "wait", lambda *_: None, expected_first)
    yield "planted: nobody waits for the counts", lambda: with_sums_on_device(not_waiting)
    yield "planted: constants for one device", patched(layout.Layout, "_constants_on", of_one_device)
    yield "planted: memory is not recorded", freed_early


def cases() -> Iterator[tuple[str, Case]]:
    for lag in (0, 1):
        for kind in (rules, probes, settings, alarms):
            for name, case in kind(lag):
                yield name + ", lag" * lag, case
    yield from planted()


def told(engine: Engine, made: Balancer) -> Balancer:
    made.set_engine(engine)
    return made


def run(case: Case) -> list[Any]:
    try:
        return case()
    except Exception as wrong:
        where = traceback.extract_tb(wrong.__traceback__)
        own = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in where if "mtl_dist" in f.filename]
        return [None, [], f"{type(wrong).__name__}: {wrong}", *own[-3:]]


def main() -> None:
    torch.set_num_threads(1)
    stand_in.install()
    results = {name: run(case) for name, case in cases()}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main()

"""Part `core`: on the device, every rule and probe trains as it does on the CPU."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.machine import wait
from benchmarks.gpu.model import TASKS, Net, batch, make, rule, stepper
from benchmarks.gpu.record import CannotRun, Found, Record, quiet
from mtl_dist import RULES, Engine, FeatureProbe, FeatureTap, Needs, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, InverseGradNorm, InverseLoss, Smooth

CPU = torch.device("cpu")
STEPS = 4
EXACT = 1e-9  # float64; a batch in another order moves no result by more than 5e-16
PROBES: dict[str, Callable[[], Probe]] = {
    "FeatureProbe": FeatureProbe,
    "FeatureProbe(reevaluate=True)": partial(FeatureProbe, reevaluate=True),
    "FeatureTap": FeatureTap,
    "SharedLayerProbe": SharedLayerProbe,
    "ParameterProbe": ParameterProbe,
}


def checks(device: torch.device, *, brief: bool = False) -> Iterator[tuple[str, Callable[[], Found | None]]]:
    """Every check by its name. `brief`: a few rules only."""
    names = ["mgda", "inverse_loss", "famo"] if brief else sorted(RULES)
    for name in names:
        for lag in (0,) if RULES[name].own_batch else (0, 1):
            yield f"rule {name}, lag={lag}", partial(same_as_cpu, device, name, None, lag)
    for probe in PROBES:
        for lag in (0, 1):
            if not (lag and "reevaluate" in probe):  # with a lag the heads run once
                yield f"{probe}, lag={lag}", partial(same_as_cpu, device, "mgda", probe, lag)
    yield "4 virtual ranks equal one process", partial(virtual_ranks, device)
    yield "random numbers of heads that are evaluated again", partial(random_state, device)
    for lag in (0, 1):
        yield f"a NaN is an error that names its task, lag={lag}", partial(nan_is_an_error, device, lag)
    yield "a NaN with on_nonfinite='skip' leaves no gradient", partial(nan_is_skipped, device)
    for dtype in (torch.bfloat16, torch.float16):
        for lag in (0, 1):
            yield f"autocast {dtype}, lag={lag}".replace("torch.", ""), partial(half, device, dtype, lag)
    yield "a step that the GradScaler skips is forgotten", partial(skipped_step, device)
    yield "check=True finds nothing", partial(explicit_check, device)
    yield "a checkpoint continues bit for bit", partial(checkpoint, device)
    for lag in (0, 1):
        yield f"memory does not grow, lag={lag}", partial(memory, device, lag)


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """All checks."""
    with quiet():
        for name, check in checks(device, brief=brief):
            record.run(name, check)


def train(net: Net, device: torch.device, steps: int = STEPS, dtype: torch.dtype = torch.float64) -> Found:
    """Weights of every step and the parameters at the end, on the CPU in float64."""
    step = stepper(net, device, dtype)
    weights = []
    for number in range(steps):
        step(number)
        weights.append(net.balancer.report.weight_vector.detach().to(CPU, torch.float64))
    parameters = torch.cat([p.detach().flatten() for p in net.parameters()]).to(CPU, torch.float64)
    return {"weights": torch.stack(weights), "parameters": parameters}


def distance(expected: Tensor, got: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    return float((expected - got).abs().max() / expected.abs().max())


def agree(expected: Found, got: Found, bound: float) -> Found:
    """The largest error; raises `AssertionError` where it is above the bound or no number."""
    errors = {name: distance(expected[name], got[name]) for name in expected}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else math.inf)
    assert errors[worst] <= bound, f"{worst} differ by {errors[worst]:.1e}, allowed are {bound:.0e}"
    return {"error": errors[worst]}


def same_as_cpu(device: torch.device, name: str, probe: str | None, lag: int) -> Found:
    """Weights and parameters after some steps, on the device and on the CPU."""
    both = []
    for where in (CPU, device):
        chosen = rule(name)
        made = None if probe is None else PROBES[probe]()
        losses_only = made is None and chosen.needs is Needs.LOSSES
        both.append(train(make(chosen, made, device=where, losses_only=losses_only, lag=lag), where))
    return agree(*both, EXACT)


def virtual_ranks(device: torch.device) -> Found:
    """Four shards in one process train like the whole batch."""
    expected = train(make(MGDA(), device=device), device)
    net = make(MGDA(), device=device)
    ranks = VirtualRanks(4, net.balancer, net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    weights = []
    for number in range(STEPS):
        optimizer.zero_grad()
        x, labels = batch(number % 4, device)
        parts = list(zip(x.chunk(4), labels.chunk(4), strict=True))

        def one(rank: int, parts: list[tuple[Tensor, Tensor]] = parts) -> Tensor:
            total = net(*parts[rank])
            (total / 4).backward()
            return total

        ranks.run(one)
        optimizer.step()
        weights.append(net.balancer.report.weight_vector.to(CPU, torch.float64))
    parameters = torch.cat([p.detach().flatten() for p in net.parameters()]).to(CPU)
    return agree(expected, {"weights": torch.stack(weights), "parameters": parameters}, EXACT)


def random_state(device: torch.device) -> None:
    """Heads with dropout that run twice leave the generators as one run does."""
    after = []
    for probe in (None, FeatureProbe(reevaluate=True)):
        net = make(None if probe is None else MGDA(), probe, device=device, dropout=0.5)
        x, labels = batch(0, device)
        torch.manual_seed(3)
        net(x, labels).backward()
        after.append(torch.rand(4, device=device).to(CPU))
    assert torch.equal(*after), "the generator of the device went on"


def poisoned(net: Net, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch whose first task has a NaN."""
    x, labels = batch(0, device)
    with torch.no_grad():
        net.heads[0][2].bias.fill_(math.nan)
    return x, labels


def nan_is_an_error(device: torch.device, lag: int) -> Found:
    """At the next call at the latest, on an accelerator."""
    net = make(InverseGradNorm(), device=device, lag=lag)
    x, labels = poisoned(net, device)
    for calls in range(1, 4):
        try:
            net(x, labels).backward()
            wait(device)
        except ValueError as error:
            if "number" not in str(error):
                raise
            return {"calls": calls}
    raise AssertionError("three steps with a NaN raised no error")


def nan_is_skipped(device: torch.device) -> None:
    """Every gradient of the step is zero."""
    net = make(InverseGradNorm(), device=device, on_nonfinite="skip")
    x, labels = poisoned(net, device)
    net(x, labels).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is None or not parameter.grad.count_nonzero(), f"{name} has a gradient"


def scaled_step(
    net: Net,
    scaler: Any,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    dtype: torch.dtype,
    number: int,
) -> None:
    """A step of mixed precision."""
    x, labels = batch(number % 4, device, torch.float32)
    optimizer.zero_grad()
    with torch.autocast(device.type, dtype):
        total = net(x, labels)
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()


def half(device: torch.device, dtype: torch.dtype, lag: int) -> Found:
    """Mixed precision, with loss scaling in float16: the weights stay near those of float32."""
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise CannotRun("this GPU has no bfloat16")
    net = make(InverseGradNorm(), device=device, dtype=torch.float32, lag=lag)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**10, enabled=dtype == torch.float16)
    if scaler.is_enabled():
        net.balancer.set_engine(Engine(scaled=scaler.scale))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    weights = []
    for number in range(STEPS):
        scaled_step(net, scaler, optimizer, device, dtype, number)
        weights.append(net.balancer.report.weight_vector.to(CPU, torch.float64))
    expected = train(
        make(InverseGradNorm(), device=device, dtype=torch.float32, lag=lag), device, STEPS, torch.float32
    )
    # a gradient in this precision is off by a few units of 2^-8 or 2^-11
    bound = 2.0**-4 if dtype == torch.bfloat16 else 2.0**-7
    return agree({"weights": expected["weights"]}, {"weights": torch.stack(weights)}, bound)


def skipped_step(device: torch.device) -> None:
    """A loss scale that overflows: the optimizer and the rule are as before."""
    net = make(Smooth(InverseLoss(), 0.5), FeatureProbe(), device=device, dtype=torch.float32)
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**60, growth_interval=1000)
    skipped = [False]
    net.balancer.set_engine(Engine(scaled=scaler.scale, skipped=lambda: skipped[0]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = net.balancer.state_dict()
    scaled_step(net, scaler, optimizer, device, torch.float16, 0)
    skipped[0] = scaler.get_scale() < 2.0**60
    assert skipped[0], "a loss scale of 2^60 did not overflow in float16"
    after = net.balancer.state_dict()
    for key, value in before.items():
        if isinstance(value, Tensor) and "step" not in key:
            assert torch.equal(value.to(CPU), after[key].to(CPU)), f"{key} changed in a step that was skipped"


def explicit_check(device: torch.device) -> Found:
    """Explicit gradients in float64, beside the probe's."""
    net = make(MGDA(), device=device, check=True)
    train(net, device)
    problems = [str(finding) for finding in net.balancer.findings]
    assert not problems, problems
    return {}


def checkpoint(device: torch.device) -> None:
    """Saved after two steps, loaded into another balancer on the device."""
    if importlib.util.find_spec("safetensors") is None:
        raise CannotRun("safetensors is not installed, in which checkpoints are written")
    from mtl_dist import checkpoint as files

    expected = make(Smooth(MGDA(), 0.5), device=device)
    step = stepper(expected, device)
    step(0), step(1)
    with tempfile.TemporaryDirectory() as folder:
        files.save(expected.balancer, Path(folder))
        other = make(Smooth(MGDA(), 0.5), device=device)
        other.load_state_dict(expected.state_dict())
        files.load(other.balancer, Path(folder))
    both = []
    for net in (expected, other):
        net(*batch(2, device)).backward()
        both.append(net.balancer.report.weight_vector)
    assert torch.equal(*both), both


def memory(device: torch.device, lag: int) -> Found:
    """What is allocated between two steps."""
    if device.type != "cuda":
        raise CannotRun("only an accelerator counts its memory")
    step = stepper(make(MGDA(), FeatureTap(), device=device, lag=lag), device)
    held = []
    for steps in (10, 40):
        for number in range(steps):
            step(number)
        wait(device)
        torch.empty(1, device=device)  # now the allocator takes back what another stream has used
        held.append(torch.cuda.memory_allocated(device))
    grown = held[1] - held[0]
    assert grown <= 0, f"40 steps left {grown} bytes"
    return {"bytes": grown, "tasks": len(TASKS)}

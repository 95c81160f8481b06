"""What a step costs, in numbers without noise: operators, and values that the host waits for.

Times are in benchmarks/; these counts hold on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from operator_calls import READS, Operators, beyond
from subjects import build
from torch import Tensor, nn

from mtl_dist import RULES, Balancer, FeatureTap, Rule, SharedLayerProbe
from mtl_dist.balancer import deferred, lagged_step, progress
from mtl_dist.checks import recent
from mtl_dist.losses import gradients, samples, tasks
from mtl_dist.probes.shared_layer import probe as layer_probe
from mtl_dist.sync import summed, synchronizer
from mtl_dist.weighting import InverseGradNorm, InverseLoss, helpers


class Net(nn.Module):
    """A trunk and n linear heads; without a rule a plain sum."""

    def __init__(self, n: int, rule: Rule | None = None, form: str = "heads", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.last = nn.Linear(5, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(n))
        self.form = form
        self.tasks = [f"task{i}" for i in range(n)]
        self.balancer = None if rule is None else Balancer(self.tasks, rule, **settings)
        self.x, self.y = torch.randn(8, 5), torch.randn(8, n)
        self.ids = torch.arange(8) % n

    def loss(self, i: int, z: Tensor) -> Tensor:
        return (self.heads[i](z)[:, 0] - self.y[:, i]).square().mean() + 0.1

    def forward(self) -> Tensor:
        h = self.trunk(self.x).tanh()
        if self.balancer is None:
            z = self.last(h)
            return sum((self.loss(i, z) for i in range(len(self.tasks))), torch.zeros(()))
        layered = isinstance(self.balancer.probe, SharedLayerProbe)
        given, layer = (h, {"layer": self.last}) if layered else (self.last(h), {})
        if self.form == "losses":
            return self.balancer({task: self.loss(i, given) for i, task in enumerate(self.tasks)})
        if self.form == "mixture":
            return self.balancer(given, self.by_sample, task_ids=self.ids, **layer)
        heads = {task: (lambda z, i=i: self.loss(i, z)) for i, task in enumerate(self.tasks)}
        return self.balancer(given, heads, **layer)

    def by_sample(self, z: Tensor) -> Tensor:
        out = torch.stack([head(z)[:, 0] for head in self.heads], 1)
        return (out - self.y).square().gather(1, self.ids[:, None])[:, 0] + 0.1


class TwoRanks:
    """Collectives of two ranks that hold the same numbers."""

    rank, world_size = 0, 2

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        buffer.mul_(2)
        return lambda: None

    def gather_text(self, text: str) -> list[str | None]:
        return [text, text]


def stepper(net: Net, *, ranks: bool = False) -> Callable[[], None]:
    """A training step without the optimizer, after three such steps."""
    if ranks and net.balancer is not None:
        net.balancer._synchronizer.use(TwoRanks())

    def step() -> None:
        net().backward()

    for _ in range(3):
        step()
    return step


# ---- operators ----------------------------------------------------------------------------------------

N = 8
BOUNDS = {
    "losses": (30, InverseLoss(), "losses", {}),
    "losses, lag": (30, InverseLoss(), "losses", {"lag": 1, "counts": "equal"}),
    "tap, lag": (30 + 3 * N, InverseGradNorm(), "heads", {"lag": 1, "counts": "equal"}),
    "FeatureProbe": (40 + 8 * N, InverseGradNorm(), "heads", {}),
}


@pytest.mark.parametrize("ranks", [False, True], ids=["one process", "two ranks"])
@pytest.mark.parametrize("name", BOUNDS)
def test_operators_beyond_the_plain_step(name: str, ranks: bool) -> None:
    bound, rule, form, settings = BOUNDS[name]
    step, plain = stepper(Net(N, rule, form, **settings), ranks=ranks), stepper(Net(N))
    # the stand-in's product is no part of the library
    assert beyond(step, plain) - ranks <= bound


def test_losses_alone_cost_no_more_for_more_tasks() -> None:
    costs = [beyond(stepper(Net(n, InverseLoss(), "losses")), stepper(Net(n))) for n in (4, 8, 32)]
    assert costs[2] <= costs[1] <= costs[0]  # a plain sum of n losses adds n - 1 times


# ---- values that the host waits for -------------------------------------------------------------------

METHODS = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")


class Waits:
    """Notes where the host reads a tensor; `allowed` is where it reads what is on the host."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.depth = 0

    def note(self, what: str) -> None:
        if not self.depth:
            self.read.append(what)

    @contextmanager
    def allowed(self) -> Iterator[None]:
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class Reading(Operators):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        if name in READS:
            self.waits.note(name)
        return super().__torch_dispatch__(func, types, args, kwargs)


class LateCopy:
    """A stand-in for the copy from an accelerator: it is there at the next step."""

    def __init__(self, tensor: Tensor, waits: Waits) -> None:
        self.is_here, self._tensor, self._waits = False, tensor.clone(), waits
        self.dtype = tensor.dtype

    def tensor(self) -> Tensor:
        return self._tensor

    def values(self) -> Any:
        with self._waits.allowed():
            return self._tensor.tolist()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    """The accelerator's path through the library, on the CPU: no tensor may be read, copies come late."""
    noted = Waits()
    modules = (summed, synchronizer, gradients, samples, tasks, layer_probe, helpers, deferred, progress)
    for module in modules:
        monkeypatch.setattr(module, "HOST", "none of these")
    for module in (deferred, summed, recent):
        monkeypatch.setattr(module, "HostCopy", lambda tensor: LateCopy(tensor, noted))

    @contextmanager
    def beside(_: Tensor) -> Iterator[None]:
        yield

    monkeypatch.setattr(synchronizer, "aside", beside)
    for method in METHODS:
        original = getattr(Tensor, method)

        def reading(self: Tensor, *args: Any, original: Any = original, method: str = method) -> Any:
            noted.note(method)
            with noted.allowed():
                return original(self, *args)

        monkeypatch.setattr(Tensor, method, reading)
    return noted


def allow_the_host_part(monkeypatch: pytest.MonkeyPatch, waits: Waits) -> None:
    """With a lag, what has arrived is on the host, where the rule is solved."""
    for owner, name in ((lagged_step.LaggedStep, "finish"), (lagged_step.LaggedStep, "visible_weights")):
        original = getattr(owner, name)

        def on_the_host(*args: Any, original: Any = original) -> Any:
            with waits.allowed():
                return original(*args)

        monkeypatch.setattr(owner, name, on_the_host)


def reads_of_a_step(net: Net, waits: Waits) -> list[str]:
    net.balancer._synchronizer.use(TwoRanks())
    for _ in range(9):  # the watches look at the 8th step
        net().backward()
    waits.read.clear()
    with Reading(waits):
        net().backward()
    return list(waits.read)


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("form", ["heads", "mixture"])
def test_with_lag_the_host_reads_nothing(
    name: str, form: str, waits: Waits, monkeypatch: pytest.MonkeyPatch
) -> None:
    allow_the_host_part(monkeypatch, waits)
    with waits.allowed():
        net = Net(3, build(name, ("task0", "task1", "task2")), form, lag=1, on_nonfinite="hold")
    assert reads_of_a_step(net, waits) == []


@pytest.mark.parametrize("probe", [FeatureTap(), SharedLayerProbe(), SharedLayerProbe(sketch=8)], ids=repr)
def test_with_lag_no_probe_reads(probe: Any, waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_the_host_part(monkeypatch, waits)
    if isinstance(probe, SharedLayerProbe):
        probe = SharedLayerProbe(form="exact", sketch=probe.sketch)

    def scatter(self: TwoRanks, mine: Tensor, by_rank: Tensor) -> None:
        mine.copy_(2 * by_rank[0])

    monkeypatch.setattr(TwoRanks, "reduce_scatter", scatter, raising=False)
    with waits.allowed():
        net = Net(3, InverseGradNorm(), probe=probe, lag=1)
    # the shifts of a sketch are random numbers of the host
    assert reads_of_a_step(net, waits) == ([] if getattr(probe, "sketch", None) is None else ["tolist"])


@pytest.mark.parametrize("name", sorted(RULES))
def test_without_lag_the_host_reads_what_a_solver_needs_and_no_more(name: str, waits: Waits) -> None:
    with waits.allowed():
        net = Net(3, build(name, ("task0", "task1", "task2")), on_nonfinite="hold")
    reads = reads_of_a_step(net, waits)
    if name == "relobralo":  # its own random number, drawn on the host
        assert reads == ["__bool__"]
        return
    assert reads in ([], ["cpu", "numpy"]), reads  # one copy to the host, for a solver


def test_the_tool_sees_a_read(waits: Waits) -> None:
    tensor = torch.ones(3)
    with Reading(waits):
        if tensor.sum() > 0:
            tensor.nonzero()
    assert waits.read == ["__bool__", "nonzero"]

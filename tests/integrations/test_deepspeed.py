"""DeepSpeed's glue: what it reads off an engine, and float16, which needs a GPU, by a stand-in.

Real engines are trained in tests/engines.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.engines import deepspeed_facts
from mtl_dist.integrations import deepspeed as glue
from mtl_dist.probes import Probe
from mtl_dist.weighting import DWA, MGDA, Rule, Smooth

TASKS = ("a", "b")


class Engine:
    """Float16 training as DeepSpeed does it, in float32: scaled losses, and steps skipped for an overflow."""

    sequence_parallel_size = 1
    seq_data_parallel_group = None

    def __init__(self, net: nn.Module, *, accumulation: int = 1, scale: float = 2.0**10) -> None:
        self.module = net
        self.accumulation = accumulation
        self.optimizer = SimpleNamespace(loss_scale=scale, overflow=False)
        self.micro_steps = self.global_steps = 0
        self._sgd = torch.optim.SGD(net.parameters(), lr=0.1)

    def fp16_enabled(self) -> bool:
        return True

    def managed_gradient_accumulation(self) -> bool:
        return True

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def zero_optimization_partition_weights(self) -> bool:
        return False

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self.micro_steps + 1) % self.accumulation == 0

    def backward(self, loss: Tensor) -> None:
        (self.optimizer.loss_scale * loss / self.accumulation).backward()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self.optimizer.overflow = not all(g.isfinite().all() for g in gradients)
            if self.optimizer.overflow:
                self.optimizer.loss_scale /= 2
            else:
                for gradient in gradients:
                    gradient /= self.optimizer.loss_scale
                self._sgd.step()
            self._sgd.zero_grad()
            self.global_steps += 1
        self.micro_steps += 1


class Net(nn.Module):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.balancer, self.trunk = balancer, nn.Linear(4, 3)
        self.heads = nn.ModuleDict({task: nn.Linear(3, 1) for task in TASKS})

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x).tanh()
        return self.balancer(z, {t: (lambda z, t=t: (self.heads[t](z) - 1).square().mean()) for t in TASKS})


@pytest.fixture(autouse=True)
def _any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in is no DeepSpeedEngine; that check has its own test."""
    monkeypatch.setattr(glue, "check_engine", lambda engine: None)


def train(
    rule: Rule, probe: Probe | None, *, scale: float, overflow_at: int | None, window: int | None = None
) -> tuple[list[dict], dict[str, Any]]:
    """Six optimizer steps, of which one can overflow; rows of the others, and the balancer's state."""
    torch.manual_seed(0)
    balancer = Balancer(TASKS, rule, probe=probe, window=window)
    net = Net(balancer)
    engine = Engine(net, accumulation=2, scale=scale)
    glue.attach(balancer, engine)
    rows: list[dict] = []
    for number in range(6 if overflow_at is not None else 5):
        data = number - (overflow_at is not None and number > overflow_at)
        for micro in range(2):
            x = torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * data + micro))
            loss = net(x)
            if number == overflow_at and micro == 1:
                # infinite in float16 at this scale
                net.trunk.weight.grad.fill_(torch.inf)
            engine.backward(loss)
            engine.step()
            report = balancer.report
            if micro == 1 and number != overflow_at:
                rows.append({"step": report.step, **report.grad_norms, **report.weights})
    return rows, balancer.state_dict()


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()])
def test_a_loss_scale_and_a_skipped_step_leave_no_trace(probe: Probe, window: int | None) -> None:
    rule = Smooth(MGDA(), 0.5)
    expected, state = train(rule, probe, scale=1.0, overflow_at=None, window=window)
    got, scaled_state = train(rule, probe, scale=2.0**12, overflow_at=2, window=window)
    assert [row["step"] for row in got] == [row["step"] for row in expected]
    for a, b in zip(expected, got, strict=True):
        assert b == pytest.approx(a, rel=1e-6)
    assert scaled_state["step"] == state["step"]
    for key, value in state.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(scaled_state[key], value, rtol=1e-6, atol=0)


def test_a_losses_only_rule_forgets_a_skipped_step() -> None:
    expected, state = train(DWA(), None, scale=1.0, overflow_at=None)
    got, scaled_state = train(DWA(), None, scale=8.0, overflow_at=4)
    assert [row["a"] for row in got] == pytest.approx([row["a"] for row in expected], rel=1e-6)
    assert scaled_state["step"] == state["step"] == 10


def test_the_engine_is_asked_at_each_step() -> None:
    engine = Engine(nn.Linear(1, 1), accumulation=2)
    described = deepspeed_facts(engine)
    assert described.partitioned is False
    assert described.scaled is not None
    assert described.skipped is not None
    assert described.closes_window is not None
    assert described.scaled(torch.tensor(3.0)) == 3 * 2.0**10
    engine.optimizer = SimpleNamespace(loss_scale=2.0, overflow=True)  # made anew, or changed by its step
    assert described.scaled(torch.tensor(3.0)) == 6
    assert described.skipped()
    assert not described.closes_window()
    engine.micro_steps = 1
    assert described.closes_window()


def test_an_optimizer_that_hides_its_skips_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = Engine(nn.Linear(1, 1))
    skipped = deepspeed_facts(engine).skipped
    engine.optimizer = SimpleNamespace(loss_scale=2.0)
    assert [skipped(), skipped()] == [False, False]
    assert [record.message.split(".")[0] for record in caplog.records] == [
        "mtl_dist: DeepSpeed's SimpleNamespace does not report the steps that it skips because of an overflow"
    ]


def test_without_float16_there_is_no_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(nn.Linear(1, 1))
    monkeypatch.setattr(engine, "fp16_enabled", lambda: False)
    monkeypatch.setattr(engine, "managed_gradient_accumulation", lambda: False)
    monkeypatch.setattr(engine, "zero_optimization_partition_weights", lambda: True)
    described = deepspeed_facts(engine)
    assert described.scaled is None
    assert described.closes_window is None
    assert described.partitioned


def test_an_engine_that_always_manages_the_accumulation_knows_its_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(Engine, "managed_gradient_accumulation")  # as in DeepSpeed 0.18
    engine = Engine(nn.Linear(1, 1), accumulation=2)
    described = deepspeed_facts(engine)
    assert not described.closes_window()
    engine.micro_steps = 1
    assert described.closes_window()


def test_a_window_must_be_the_engines() -> None:
    balancer = Balancer(TASKS, MGDA(), window=4)
    with pytest.raises(ValueError, match="window=4 micro-batches, and the engine accumulates 2"):
        glue.attach(balancer, Engine(nn.Linear(1, 1), accumulation=2))


def test_sequence_parallelism_is_refused() -> None:
    engine = Engine(nn.Linear(1, 1))
    engine.sequence_parallel_size = 2
    with pytest.raises(ValueError, match=r"sequence parallelism \(size 2\)"):
        glue.attach(Balancer(TASKS, MGDA()), engine)


def test_a_gradient_scaler_that_hides_its_skips_is_refused() -> None:
    for hidden in ("engine", "optimizer"):
        engine = Engine(nn.Linear(1, 1))
        if hidden == "engine":
            engine.torch_autocast_z0_gradscaler = object()
        else:
            engine.optimizer.torch_autocast_gradscaler = object()
        with pytest.raises(ValueError, match="torch_autocast in float16"):
            glue.attach(Balancer(TASKS, MGDA()), engine)

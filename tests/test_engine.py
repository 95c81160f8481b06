"""What the engine tells the balancer: accumulation windows, loss scale, skipped steps, partitioning."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import RULES, Balancer, FeatureProbe, FeatureTap
from mtl_dist.engines import Engine
from mtl_dist.weighting import FAMO, MGDA, Equal, GeometricMean, InverseGradNorm, Smooth, UPGrad

PROBES = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()]
TASKS = ("a", "b", "c")
WINDOW_RULES = [Equal(), GeometricMean(), InverseGradNorm(), MGDA(), Smooth(UPGrad())]


class Net(nn.Module):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def forward(self, x: Tensor) -> Tensor:
        heads = {task: self._head(i, x) for i, task in enumerate(TASKS)}
        return self.balancer(self.trunk(x), heads)

    def _head(self, i: int, x: Tensor) -> Callable[[Tensor], Tensor]:
        def loss(z: Tensor) -> Tensor:
            out = self.heads[TASKS[i]](z).squeeze(-1)
            return (i + 1) * (out - x[:, i]).square().mean() + 0.1

        return loss


def batches(number: int, size: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(number, size, 5, generator=generator, dtype=dtype))


def trained(net: Net, windows: list[list[Tensor]], lr: float = 0.05) -> list[Tensor]:
    """SGD, one optimizer step a window; the weights of each report."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    weights = []
    for window in windows:
        optimizer.zero_grad()
        for batch in window:
            (net(batch) / len(window)).backward()
        optimizer.step()
        weights.append(net.balancer.report.weight_vector)
    return weights


# ---- windows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", PROBES, ids=repr)
@pytest.mark.parametrize(
    "rule", [Equal(), GeometricMean(), InverseGradNorm(), MGDA(), Smooth(UPGrad())], ids=repr
)
def test_a_held_window_equals_one_larger_batch(rule: object, probe: object) -> None:
    data = batches(6, 12, torch.float64)
    small = Net(Balancer(TASKS, rule, probe=probe, window=4)).double()
    large = Net(Balancer(TASKS, rule, probe=probe, window=1)).double()
    got = trained(small, [list(batch.split(3)) for batch in data])
    expected = trained(large, [[batch] for batch in data])
    torch.testing.assert_close(torch.stack(got), torch.stack(expected), rtol=1e-10, atol=0)
    for a, b in zip(small.parameters(), large.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert small.balancer.step == 6
    torch.testing.assert_close(got[0], torch.full((3,), 1 / 3, dtype=torch.float64))  # nothing is known yet
    if not isinstance(rule, Equal):
        assert not torch.allclose(got[1], got[0])


def test_a_held_window_uses_the_rule_on_the_window_before() -> None:
    data = batches(3, 12)
    held, now = Net(Balancer(TASKS, MGDA(), window=3)), Net(Balancer(TASKS, MGDA()))
    weights = trained(held, [list(batch.split(4)) for batch in data], lr=0.0)
    direct = trained(now, [[batch] for batch in data], lr=0.0)
    torch.testing.assert_close(weights[1], direct[0])
    torch.testing.assert_close(weights[2], direct[1])
    torch.testing.assert_close(held.balancer.report.stats.gram, now.balancer.report.stats.gram)


def test_micro_batches_have_weights_of_their_own_by_default() -> None:
    net = Net(Balancer(TASKS, MGDA()))
    trained(net, [list(batches(1, 12)[0].split(3))])
    assert net.balancer.step == 4


def test_the_engine_says_where_a_window_ends() -> None:
    ends = iter([False, True, False, False, True])
    net = Net(Balancer(TASKS, MGDA(), window=3))
    net.balancer.set_engine(Engine(closes_window=lambda: next(ends)))
    steps = []
    for batch in batches(5, 4):
        net(batch).backward()
        steps.append(net.balancer.step)
    assert steps == [0, 1, 1, 1, 2]


def test_a_window_with_an_infinite_loss_is_held_as_a_whole() -> None:
    balancer = Balancer(["a", "b"], MGDA(), window=2, on_nonfinite="hold")
    z = torch.ones(3, requires_grad=True)
    heads = {"a": lambda z: z.square().sum(), "b": lambda z: (z - 3).square().sum() / 9}
    for _ in range(2):
        balancer(z * 1, heads)
    before = balancer.weights
    balancer(z * 1, {**heads, "a": lambda z: z.sum() * torch.inf})
    balancer(z * 2, heads)
    assert balancer.report.held
    assert balancer.weights == before


@pytest.mark.parametrize("window", [0, -1, 1.5, True, "4"])
def test_bad_windows(window: object) -> None:
    with pytest.raises(ValueError, match="window must be a number of micro-batches"):
        Balancer(TASKS, MGDA(), window=window)


# ---- loss scale ---------------------------------------------------------------------------------


def small_gradients(dtype: torch.dtype, scale: float | None) -> Tensor:
    """Gram of losses whose gradients are far below what float16 can hold."""
    balancer = Balancer(["a", "b"], MGDA())
    if scale is not None:
        balancer.set_engine(Engine(scaled=lambda one: one * scale))
    z = torch.linspace(-1, 1, 8, dtype=dtype, requires_grad=True)
    balancer(
        z * 1, {"a": lambda z: (z * z).float().sum() * 1e-9, "b": lambda z: (z + 1).float().sum() * 3e-9}
    )
    return balancer.report.stats.gram


def test_float16_gradients_are_measured_under_the_loss_scale() -> None:
    expected = small_gradients(torch.float64, None)
    assert not small_gradients(torch.float16, None).any()  # what the scale is for
    got = small_gradients(torch.float16, 2.0**20)
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_statistics_under_a_scale_are_true_values(probe: object) -> None:
    plain, scaled = Net(Balancer(TASKS, MGDA(), probe=probe)), Net(Balancer(TASKS, MGDA(), probe=probe))
    scaled.balancer.set_engine(Engine(scaled=lambda one: one * 2.0**14))
    batch = batches(1, 12)[0]
    plain(batch).backward()
    (2.0**14 * scaled(batch)).backward()
    stats = [net.balancer.report.stats for net in (plain, scaled)]
    assert torch.equal(stats[0].gram, stats[1].gram)  # powers of two are exact
    assert torch.equal(stats[0].losses, stats[1].losses)


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_overflow_under_a_scale_is_held_and_not_an_error(probe: object) -> None:
    balancer = Balancer(["a", "b"], Smooth(MGDA()), probe=probe)
    scale = 1.0
    balancer.set_engine(Engine(scaled=lambda one: one * scale))
    z = torch.ones(3, dtype=torch.float16, requires_grad=True)
    heads = {"a": lambda z: (z * z).sum(), "b": lambda z: (2 * z + 1).sum()}
    balancer(z * 1, heads).backward()
    before = snapshot(balancer)
    scale = 1e6
    (balancer(z * 1, heads) * scale).backward()
    assert balancer.report.held
    assert snapshot(balancer) == {**before, "step": 2}


def test_an_infinite_loss_under_a_scale_is_an_error() -> None:
    balancer = Balancer(["a", "b"], MGDA())
    balancer.set_engine(Engine(scaled=lambda one: one * 4.0))
    z = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="task 'b' on rank 0"):
        balancer(z * 1, {"a": lambda z: z.sum(), "b": lambda z: z.sum() / 0})


# ---- skipped steps ------------------------------------------------------------------------------


def snapshot(balancer: Balancer) -> dict[str, object]:
    return {key: v.tolist() if isinstance(v, Tensor) else v for key, v in balancer.state_dict().items()}


@pytest.mark.parametrize("probe", PROBES, ids=repr)
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_skipped_step_leaves_the_rule_as_it_was(probe: object, micro_batches: int) -> None:
    def run(skip: set[int], numbers: list[int]) -> Balancer:
        skipped = False
        calls = 0
        net = Net(Balancer(TASKS, Smooth(FAMO()), probe=probe))
        engine = Engine(closes_window=lambda: calls % micro_batches == 0, skipped=lambda: skipped)
        net.balancer.set_engine(engine)
        for number in numbers:
            for batch in data[number]:
                calls += 1
                net(batch).backward()
            skipped = number in skip
        return net.balancer

    data = [list(batch.split(4)) for batch in batches(6, 4 * micro_batches)]
    got, expected = run({1, 4}, [0, 1, 2, 3, 4, 5]), run(set(), [0, 2, 3, 5])
    assert snapshot(got) == snapshot(expected)
    assert got.step == 4 * micro_batches
    assert snapshot(run({5}, [0, 2, 3, 5])) == snapshot(run(set(), [0, 2, 3]))  # settled before it is saved


def test_a_real_scaler_on_half_precision() -> None:
    """Its first scales overflow: those steps are skipped, and the rule then counts only the others."""
    net = Net(Balancer(TASKS, InverseGradNorm()))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**26, growth_interval=1000)
    skipped: list[bool] = []
    net.balancer.set_engine(Engine(scaled=scaler.scale, skipped=lambda: skipped[-1]))
    for batch in batches(16, 12):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            total = net(batch)
        scaler.scale(total).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
    assert 1 <= sum(skipped) < 16
    net.balancer.state_dict()  # settles the last step
    assert net.balancer.step == 16 - sum(skipped)
    reference = Net(Balancer(TASKS, InverseGradNorm()))
    reference.load_state_dict(net.state_dict())
    with torch.autocast("cpu", torch.float16):
        net(batch)
    reference(batch)
    got, expected = (n.balancer.report.stats.grad_norms for n in (net, reference))
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=0)  # eps of float16 is 1e-3


# ---- partitioned parameters ---------------------------------------------------------------------


@pytest.fixture
def deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))


def partition(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.ds_status = "AVAILABLE"  # what DeepSpeed sets on each parameter of ZeRO-3


@pytest.mark.usefixtures("deepspeed")
@pytest.mark.parametrize("part", ["trunk", "heads"])
def test_partitioned_parameters_are_found_and_said_once(part: str, caplog: pytest.LogCaptureFixture) -> None:
    net = Net(Balancer(TASKS, MGDA()))
    if part == "heads":
        net.trunk.requires_grad_(False)
    partition(getattr(net, part))
    evaluations = []
    net.heads["a"].register_forward_hook(lambda *_: evaluations.append(1))
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for batch in batches(2, 4):
            net(batch)
    assert len(evaluations) == 4
    (record,) = caplog.records
    assert "evaluate the heads a second time" in record.getMessage()


@pytest.mark.usefixtures("deepspeed")
def test_refusing_to_evaluate_again_names_the_way_out() -> None:
    net = Net(Balancer(TASKS, MGDA(), probe=FeatureProbe(reevaluate=False)))
    partition(net)
    with pytest.raises(ValueError, match=r"reevaluate=False: .*ZeRO-3.*FeatureTap"):
        net(batches(1, 4)[0])


@pytest.mark.usefixtures("deepspeed")
def test_looking_for_partitions_leaves_no_trace() -> None:
    net = Net(Balancer(TASKS, MGDA()))
    calls = []
    net.heads["a"].register_forward_pre_hook(lambda *_: calls.append(1))
    state = torch.get_rng_state()
    net(batches(1, 4)[0])
    assert len(calls) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_every_rule_trains_in_held_windows() -> None:
    for name, rule in RULES.items():
        try:
            made = rule()
        except TypeError:  # needs arguments
            continue
        if made.own_batch:  # refused in windows
            continue
        net = Net(Balancer(TASKS, made, window=2))
        weights = trained(net, [list(batch.split(4)) for batch in batches(3, 8)])
        assert torch.stack(weights).isfinite().all(), name

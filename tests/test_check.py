"""Debug mode: each planted fault has its finding, and a sound run has none."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe
from mtl_dist.checks import Check, Watches
from mtl_dist.checks.recent import Recent
from mtl_dist.probes import SharedLayerProbe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, Equal, Fixed, GeometricMean, InverseGradNorm, Smooth, UPGrad

PROBES = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()]
Heads = dict[str, Callable[[Tensor], Tensor]]


class Net(nn.Module):
    """Features `[B, 6]`, and heads that a test plants a fault in."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.balancer = balancer
        self.trunk = nn.Linear(5, 6)
        self.a = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.2), nn.Linear(4, 1))
        self.b = nn.Linear(6, 3)

    def heads(self, x: Tensor) -> Heads:
        classes = (x[:, 0] > 0).long()
        return {
            "a": lambda z: (self.a(z).squeeze(-1) - x[:, 1]).square().mean() + 0.5,
            "b": lambda z: nn.functional.cross_entropy(self.b(z), classes),
        }

    def forward(self, x: Tensor, **planted: Callable[[Tensor], Tensor]) -> Tensor:
        return self.balancer(self.trunk(x), {**self.heads(x), **planted})


def net_with(rule: object, **settings: object) -> Net:
    return Net(Balancer(["a", "b"], rule, check=True, **settings))


def inputs(number: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 5, generator=generator) for _ in range(number)]


def kinds(balancer: Balancer) -> list[tuple[str, str | None]]:
    return [(finding.kind, finding.task) for finding in balancer.findings]


@pytest.mark.parametrize("probe", PROBES, ids=repr)
@pytest.mark.parametrize("rule", [GeometricMean(), InverseGradNorm(), MGDA(), Smooth(UPGrad())], ids=repr)
def test_a_sound_run_has_no_findings(rule: object, probe: object) -> None:
    net = net_with(rule, probe=probe)
    for x in inputs(4):
        net(x).backward()
    assert net.balancer.findings == ()
    assert net.balancer.step == 4


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_checking_changes_nothing(probe: object) -> None:
    """Neither weights nor gradients nor random numbers."""
    outcomes = []
    for check in (False, True):
        net = Net(Balancer(["a", "b"], MGDA(), probe=probe, check=check))
        for x in inputs(3):
            net(x).backward()
        outcomes.append([net.balancer.report.weight_vector, net.trunk.weight.grad, torch.rand(3)])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


class Drawing(nn.Module):
    """Its trunk, given as a function, draws random numbers."""

    def __init__(self, *, check: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.balancer = Balancer(["a", "b"], MGDA(), probe=ParameterProbe(), check=check)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.balancer(
            lambda: self.trunk(x), {"a": lambda z: z.square().mean(), "b": lambda z: z[0].sum()}
        )


def test_checking_a_trunk_given_as_a_function_changes_nothing() -> None:
    outcomes = []
    for check in (False, True):
        net = Drawing(check=check)
        for x in inputs(3):
            net(x).backward()
        outcomes.append([net.balancer.report.weight_vector, net.trunk[0].weight.grad, torch.rand(3)])
        assert net.balancer.findings == ()
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


def test_where_deepspeed_is_imported_its_partitions_are_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    net = net_with(MGDA())
    net(inputs()[0]).backward()
    assert net.balancer.findings == ()
    net = net_with(MGDA())
    net.trunk.weight.ds_status = "not available"
    with pytest.raises(
        ValueError, match="check=True takes gradients of the heads a second time, and DeepSpeed"
    ):
        net(inputs()[0])


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_losses_on_a_small_scale_are_no_fault(scale: float) -> None:
    """Vanished is what is small beside the other tasks."""
    net = net_with(Fixed({"a": 3.0, "b": 2.0}), probe=FeatureProbe())
    for x in inputs(25):
        net(
            x,
            a=lambda z: scale * 1e-3 * z.square().mean(),
            b=lambda z: scale * 1e-8 * (z - 1).square().mean(),
        )
    assert net.balancer.findings == ()
    assert net.balancer.report.grad_norms["b"] > 1e-6 * net.balancer.report.grad_norms["a"] > 0


def test_one_task_alone_shares_its_samples_with_nobody_and_is_no_fault() -> None:
    net = net_with(MGDA())
    for x in inputs(5):
        net.balancer(net.trunk(x), {"a": lambda z: z.square().mean()})
    assert net.balancer.findings == ()


@pytest.mark.parametrize("vector_first", [True, False])
def test_rows_are_those_of_the_features_that_have_some(vector_first: bool) -> None:
    """A vector beside a batch says nothing about samples."""
    balancer = Balancer(["a", "b"], MGDA(), check=True)
    trunk = nn.Linear(5, 6)
    for x in inputs(4):
        z, vector = trunk(x), trunk.weight.sum(1)
        features = (vector, z) if vector_first else (z, vector)
        heads = {
            "a": lambda f: (f[vector_first][:4] * f[not vector_first]).square().mean(),
            "b": lambda f: (f[vector_first][4:] * f[not vector_first] - 1).square().mean(),
        }
        balancer(features, heads).backward()
    assert kinds(balancer) == [("disjoint", None)]


def test_a_single_number_as_features_can_be_checked() -> None:
    balancer = Balancer(["a", "b"], MGDA(), check=True)
    trunk = nn.Linear(5, 1)
    for x in inputs(4):
        balancer(trunk(x).mean(), {"a": lambda z: z.square(), "b": lambda z: (z - 1).square()}).backward()
    assert balancer.findings == ()


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_a_task_that_is_not_connected(probe: object, caplog: pytest.LogCaptureFixture) -> None:
    net = net_with(MGDA(), probe=probe)
    x = inputs()[0]
    z = net.trunk(x)
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for _ in range(2):
            net(x, b=lambda _: net.b(z.detach()).square().mean()).backward()
    (finding,) = [finding for finding in net.balancer.findings if finding.kind == "unconnected"]
    assert (finding.task, finding.rank, finding.step) == ("b", 0, 0)
    assert str(finding).startswith("step 0, rank 0, task 'b': its loss does not depend")
    assert "does not depend on the shared features" in finding.text
    assert len([r for r in caplog.records if "does not depend" in r.getMessage()]) == 1


def test_a_nan_is_traced_to_loss_gradient_or_features() -> None:
    x = inputs()[0]
    poisoned = x.clone()
    poisoned[3, 2] = torch.nan
    faults = {
        "loss": lambda net: net(x, b=lambda z: z.sum() * torch.nan),
        "gradient": lambda net: net(x, b=lambda z: (z - z.detach()).square().sum().sqrt() + 1),
        "features": lambda net: net(poisoned),
    }
    for kind, run in faults.items():
        net = net_with(MGDA())
        with pytest.raises(ValueError, match="task 'b' on rank 0"):
            run(net)
        found = {(f.kind, f.task, f.rank, f.step) for f in net.balancer.findings}
        assert (kind, None if kind == "features" else "b", 0, 0) in found
        assert all("on this rank" in finding.text for finding in net.balancer.findings)


def test_a_nan_from_one_virtual_rank_names_it() -> None:
    net = net_with(MGDA())
    x = inputs()[0]
    x[5] = torch.nan
    ranks = VirtualRanks(4, net.balancer, net)
    shards = ranks.split(x)
    with pytest.raises(ValueError, match="on rank 2"):
        ranks.run(lambda rank: net(shards[rank]))
    assert {finding.rank for finding in net.balancer.findings} == {2}


def test_a_negative_loss_under_a_rule_of_logarithms() -> None:
    net = net_with(GeometricMean(), probe=FeatureProbe())
    with pytest.raises(ValueError, match="needs them > 0"):
        net(inputs()[0], a=lambda z: -z.square().mean())
    (finding,) = net.balancer.findings
    assert (finding.kind, finding.task, finding.rank, finding.step) == ("negative", "a", 0, 0)


def test_a_label_that_is_always_the_same() -> None:
    net = net_with(MGDA())
    for x in inputs(4):
        net(
            x,
            b=lambda z: nn.functional.cross_entropy(1e4 * z[:, :1] * z.new_tensor([1.0]), z[:, 0].long() * 0),
        )
    assert ("vanished", "b") in kinds(net.balancer)
    (finding,) = [finding for finding in net.balancer.findings if finding.kind == "vanished"]
    assert "label that is always the same" in finding.text


def test_weights_stuck_with_one_task() -> None:
    net = net_with(MGDA())
    for x in inputs(25):
        net(x, b=lambda z: 1e-4 * z.square().mean())
    (finding,) = net.balancer.findings
    assert (finding.kind, finding.task) == ("vertex", "b")
    assert str(finding).startswith("step 19, task 'b': it has had more than 99.9% of all weight for 20 steps")
    assert "shortest gradient" in finding.text


def test_tasks_that_never_share_samples() -> None:
    net = net_with(MGDA())
    for x in inputs(4):
        heads = net.heads(x)
        net(
            x,
            a=lambda z, h=heads["a"]: net.a(z[:4]).square().mean(),
            b=lambda z: net.b(z[4:]).square().mean(),
        )
    (finding,) = net.balancer.findings
    assert (finding.kind, finding.task, finding.rank, finding.step) == ("disjoint", None, 0, 2)
    assert "SharedLayerProbe" in finding.text


def test_a_mixture_is_checked_too() -> None:
    balancer = Balancer(["a", "b"], MGDA(), check=True)
    ids = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    trunk = nn.Linear(5, 6)
    for x in inputs(4):
        balancer(trunk(x), lambda z: z.square().sum(1), task_ids=ids).backward()
    assert kinds(balancer) == [("disjoint", None)]


def test_probes_elsewhere_are_not_compared_at_the_features() -> None:
    balancer = Balancer(["a", "b"], MGDA(), probe=SharedLayerProbe(), check=True)
    layer = nn.Linear(5, 6)
    for x in inputs(4):
        heads = {"a": lambda z: z[:4].square().mean(), "b": lambda z: (z[4:] - 1).square().mean()}
        balancer(x, heads, layer=layer).backward()
    assert balancer.findings == ()


def test_a_head_that_is_not_a_function_of_its_argument_is_refused() -> None:
    net = net_with(MGDA())
    calls = []

    def head(z: Tensor) -> Tensor:
        calls.append(1)
        return (z.square() * len(calls)).mean()

    with pytest.raises(RuntimeError, match="explicit gradients do not confirm"):
        net(inputs()[0], b=head)


@pytest.mark.parametrize(("error", "found"), [(1e-6, False), (2e-3, True)])
def test_weights_that_depend_on_the_last_digits(error: float, found: bool) -> None:
    check = Check(["a", "b"], MGDA(), FeatureProbe())
    for step in (4, 5):
        check.compare_weights(torch.tensor([0.5 + error, 0.5]), torch.tensor([0.5, 0.5]), step)
    findings = check.findings.all()
    assert [(f.kind, f.task, f.rank, f.step) for f in findings] == found * [("sensitive", None, None, 4)]
    assert all(str(f).startswith("step 4: the weights change by 4.0e-03 when") for f in findings)


class Always(Recent):
    def holds(self, recent: list[Tensor]) -> bool:
        return bool(torch.stack(recent).all())

    def text(self) -> str:
        return "all of the last 8"


def test_watches_speak_once_after_eight_steps_that_they_can_see(caplog: pytest.LogCaptureFixture) -> None:
    of_grams, of_weights = Always(None, None), Always(None, None)
    watches = Watches([of_grams], [of_weights])
    said = []
    for step in range(1, 21):
        # no gradient is measured at every second step; the weights of step 3 are seen until the 11th
        watches.look(None if step % 2 else torch.ones(2, 2), torch.full((2,), step != 3), rank=0)
        said.append(len(caplog.records))
    assert said == [0] * 15 + [2] * 5, "grams at step 16, their 8th; weights at step 16, not at step 8"


def test_nothing_is_checked_unless_asked() -> None:
    net = Net(Balancer(["a", "b"], Equal()))
    net(inputs()[0])
    assert net.balancer.findings == ()

"""Losses that reach the trunk other than through the features: followed exactly, refused, or said once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, Engine, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, Equal, GeometricMean, InverseGradNorm

Heads = dict[str, Callable[[Any], Tensor]]
AT_FEATURES = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()]


class Net(nn.Module):
    def __init__(self, *, ends_in_tanh: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(2, 16), nn.Linear(16, 16)
        self.last = nn.Tanh() if ends_in_tanh else nn.Identity()
        self.head = nn.Sequential(nn.Tanh(), nn.Linear(16, 1))
        self.double()

    def trunk(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()))

    def shared(self) -> list[Tensor]:
        return [*self.first.parameters(), *self.second.parameters()]


def points(seed: int = 1) -> Tensor:
    return torch.rand(12, 2, generator=torch.Generator().manual_seed(seed)).double()


def derivative(u: Tensor, x: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return found


def residual(net: Net, x: Tensor) -> Callable[[Tensor], Tensor]:
    def loss(z: Tensor) -> Tensor:
        slope = derivative(net.head(z), x)
        laplacian = derivative(slope[:, 0], x)[:, 0] + derivative(slope[:, 1], x)[:, 1]
        return (laplacian - 1).square().mean()

    return loss


def true_gram(losses: list[Tensor], parameters: list[Tensor]) -> Tensor:
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    matrix = torch.stack(rows)
    return matrix @ matrix.T


PAST: dict[str, Callable[[Net, Tensor], Callable[[Tensor], Tensor]]] = {
    "PDE residual": residual,
    "gradient penalty": lambda net, x: lambda z: (derivative(net.head(z), x).norm(dim=1) - 1).square().mean(),
    "derivative of z": lambda net, x: lambda z: derivative(z, x).square().mean(),
    "derivative alone": lambda net, x: lambda z: derivative(z.square(), x).square().mean(),
}


@pytest.mark.parametrize("form", ["mapping", "function"])
@pytest.mark.parametrize("ends_in_tanh", [True, False])
@pytest.mark.parametrize("bucket", [1, 100, 1 << 22])
@pytest.mark.parametrize("case", PAST)
def test_parameter_probe_follows_derivatives(case: str, bucket: int, ends_in_tanh: bool, form: str) -> None:
    net, x = Net(ends_in_tanh=ends_in_tanh), points().requires_grad_()
    heads = {"pde": PAST[case](net, x), "bc": lambda z: net.head(z).square().mean()}
    balancer = Balancer(["pde", "bc"], InverseGradNorm(), probe=ParameterProbe(bucket=bucket))
    given = heads if form == "mapping" else lambda z: {task: head(z) for task, head in heads.items()}
    total = balancer(net.trunk(x), given)
    z = net.trunk(x)
    losses = [head(z) for head in heads.values()]
    torch.testing.assert_close(balancer.report.stats.gram, true_gram(losses, net.shared()))
    total.backward()
    weighted = sum(w * loss for w, loss in zip(balancer.report.weights.values(), losses, strict=True))
    expected = torch.autograd.grad(weighted, net.shared())
    for parameter, gradient in zip(net.shared(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("case", ["skip", "tied", "commitment"])
def test_parameter_probe_follows_every_other_way(case: str, scale: float) -> None:
    """A layer of the trunk that a head reads, a tied weight, and a loss that does not read z at all."""
    net, x = Net(), points()
    h = net.first(x).tanh()
    z = net.last(net.second(h))
    heads: Heads = {
        "a": {
            "skip": lambda z: (z * h).square().mean(),
            "tied": lambda z: (z @ net.second.weight).square().mean(),
            "commitment": lambda z: (h - h.detach().round()).square().mean(),
        }[case],
        "b": lambda z: net.head(z).square().mean(),
    }
    balancer = Balancer(["a", "b"], MGDA(), probe=ParameterProbe())
    if scale != 1:
        balancer.set_engine(Engine(scaled=lambda value: value * scale))
    balancer(z, heads)
    expected = true_gram([head(z) for head in heads.values()], net.shared())
    torch.testing.assert_close(balancer.report.stats.gram, expected)


def test_counts_and_absent_tasks_are_followed_too() -> None:
    net, x = Net(), points().requires_grad_()
    heads = {"pde": residual(net, x), "bc": lambda z: net.head(z[:0]).square().mean(), "c": lambda z: None}
    balancer = Balancer(["pde", "bc", "c"], InverseGradNorm(), probe=ParameterProbe())
    balancer(net.trunk(x), heads, counts={"pde": 12, "bc": 0}).backward()
    expected = true_gram([residual(net, x)(z := net.trunk(x))], net.shared())
    assert z.requires_grad
    torch.testing.assert_close(balancer.report.stats.gram[0, 0], expected[0, 0])
    assert not balancer.report.stats.gram[1:].any()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("probe", AT_FEATURES, ids=repr)
@pytest.mark.parametrize("ends_in_tanh", [True, False])
@pytest.mark.parametrize("case", PAST)
def test_probes_at_the_features_refuse_derivatives(case: str, probe: Probe, ends_in_tanh: bool) -> None:
    net, x = Net(ends_in_tanh=ends_in_tanh), points().requires_grad_()
    heads = {"pde": PAST[case](net, x), "bc": lambda z: net.head(z).square().mean()}
    with pytest.raises(ValueError, match=r"derivative with respect to something before .*ParameterProbe\(\)"):
        Balancer(["pde", "bc"], MGDA(), probe=probe)(net.trunk(x), heads)


@pytest.mark.parametrize("case", PAST)
def test_looking_for_partitions_does_not_disturb_derivatives(case: str, monkeypatch) -> None:
    """Where DeepSpeed was imported, the heads are asked for their first module before they run."""
    monkeypatch.setitem(sys.modules, "deepspeed", sys.modules[__name__])
    net, x = Net(), points().requires_grad_()
    heads = {"pde": PAST[case](net, x), "bc": lambda z: net.head(z).square().mean()}
    with pytest.raises(ValueError, match="derivative with respect to something before"):
        Balancer(["pde", "bc"], MGDA())(net.trunk(x), heads)
    balancer = Balancer(["pde", "bc"], MGDA(), probe=ParameterProbe())
    balancer(net.trunk(x), heads).backward()
    assert balancer.step == 1


@pytest.mark.parametrize("probe", [FeatureProbe(), ParameterProbe()], ids=repr)
def test_check_refuses_derivatives_in_words(probe: Probe) -> None:
    net, x = Net(), points().requires_grad_()
    heads = {"pde": residual(net, x), "bc": lambda z: net.head(z).square().mean()}
    with pytest.raises(ValueError, match=r"derivative with respect to .*check=True"):
        Balancer(["pde", "bc"], MGDA(), probe=probe, check=True)(net.trunk(x), heads)


def test_rules_that_read_losses_only_take_any_derivative() -> None:
    net, x = Net(), points().requires_grad_()
    z = net.trunk(x)
    Balancer(["pde", "bc"], GeometricMean())(
        z, {"pde": residual(net, x), "bc": lambda z: net.head(z).square().mean()}
    ).backward()
    assert all(p.grad is not None for p in net.shared())


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_a_derivative_at_the_features_themselves_is_fine(probe: Probe) -> None:
    """A gradient penalty at z, and a derivative that is only looked at, do not pass the features."""
    net, x = Net(), points()
    seen: list[Tensor] = []

    def penalised(z: Tensor) -> Tensor:
        return derivative(net.head(z), z).square().mean()

    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    balancer(net.trunk(x), {"a": penalised, "b": lambda z: net.head(z).square().mean()}).backward()
    z = net.trunk(x)
    losses = [penalised(z), net.head(z).square().mean()]
    torch.testing.assert_close(balancer.report.stats.gram, true_gram(losses, [z]))
    x.requires_grad_()

    def looked_at(z: Tensor) -> Tensor:
        u = net.head(z)
        seen.extend(torch.autograd.grad(u.sum(), x, retain_graph=True))
        return u.square().mean()

    if isinstance(probe, FeatureProbe):
        Balancer(["a", "b"], MGDA())(net.trunk(x), {"a": looked_at, "b": looked_at}).backward()
        assert len(seen) == 2


def head_losses(net: Net, z: Tensor) -> dict[str, Tensor]:
    return {"a": net.head(z).square().mean(), "b": (net.head(z) - 1).square().mean()}


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureProbe(reevaluate=True), ParameterProbe()], ids=repr)
@pytest.mark.parametrize("read", ["all", "half"])
def test_a_function_that_reads_the_features_past_its_argument_is_refused(probe: Probe, read: str) -> None:
    net = Net()
    z = net.trunk(points())

    def losses(own: Tensor) -> dict[str, Tensor]:
        return {**head_losses(net, z), **({"a": head_losses(net, own)["a"]} if read == "half" else {})}

    with pytest.raises(ValueError, match="depends on the features other than through the argument"):
        Balancer(["a", "b"], MGDA(), probe=probe)(z, losses)


def test_a_mixture_that_reads_the_features_past_its_argument_is_refused() -> None:
    net = Net()
    z = net.trunk(points())
    with pytest.raises(ValueError, match="depends on the features other than through the argument"):
        Balancer(["a", "b"], InverseGradNorm())(
            z, lambda _: net.head(z).squeeze(-1).square(), task_ids=torch.arange(12) % 2
        )


@pytest.mark.parametrize("form", ["mapping", "function"])
def test_a_shared_layer_that_the_heads_run_again_is_refused(form: str) -> None:
    net = Net()
    h = net.first(points()).tanh()
    z = net.second(h)
    heads = {task: (lambda _, task=task: head_losses(net, z)[task]) for task in "ab"}
    given = heads if form == "mapping" else lambda _: head_losses(net, z)
    with pytest.raises(ValueError, match="from the argument of its function"):
        Balancer(["a", "b"], MGDA(), probe=SharedLayerProbe())(h, given, layer=net.second)


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
def test_what_the_trunk_computed_on_its_way_must_be_a_feature(probe: Probe) -> None:
    net = Net()
    h = net.first(points()).tanh()
    heads = {"a": lambda z: (z * h).square().mean(), "b": lambda z: net.head(z).square().mean()}
    with pytest.raises(ValueError, match=r"the loss of task 'a' .* make what it reads one of the features"):
        Balancer(["a", "b"], MGDA(), probe=probe)(net.second(h), heads)


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap()], ids=repr)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_tied_weight_is_a_parameter_of_the_head(probe: Probe, autocast: bool) -> None:
    net = Net().float()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        z = net.trunk(points().float())
        heads = {
            "a": lambda z: nn.functional.linear(z, net.second.weight).square().mean(),
            "b": lambda z: net.head(z).square().mean(),
        }
        Balancer(["a", "b"], MGDA(), probe=probe)(z, heads).backward()


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        r.getMessage() for r in caplog.records if "has no gradient at the shared features" in r.getMessage()
    ]


@pytest.mark.parametrize("probe", AT_FEATURES, ids=repr)
@pytest.mark.parametrize("case", ["commitment", "regulariser", "constant", "detached"])
def test_a_loss_without_a_gradient_at_the_features_is_said_once(
    case: str, probe: Probe, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = Net(), points()
    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    for _ in range(3):
        h = net.first(x).tanh()
        z = net.second(h)
        loss = {
            "commitment": lambda z, h=h: (h - h.detach().round()).square().mean(),
            "regulariser": lambda z: net.first.weight.square().mean(),
            "constant": lambda z: z.new_zeros(()),
            "detached": lambda z: net.head(z.detach()).square().mean(),
        }[case]
        balancer(z, {"a": lambda z: net.head(z).square().mean(), "b": loss}).backward()
    (message,) = warned(caplog)
    for part in ("task 'b'", "MGDA", "balancer(...) + 0.1 * term", "ParameterProbe()", "return None"):
        assert part in message


def test_nothing_is_said_of_losses_that_do_not_count(caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    heads = {"a": lambda z: net.head(z).square().mean(), "b": lambda z: z.new_zeros(())}
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        Balancer(["a", "b"], MGDA())(net.trunk(points()), heads, counts={"a": 1, "b": 0})
        Balancer(["a", "b"], Equal())(net.trunk(points()), heads)
    assert warned(caplog) == []


@pytest.mark.parametrize("form", ["mapping", "function"])
@pytest.mark.parametrize("where", ["head", "trunk"])
def test_batch_statistics_in_a_checkpoint_are_updated_as_without_the_balancer(where: str, form: str) -> None:
    x, counts = torch.randn(8, 4), []
    for balanced in (False, True):
        torch.manual_seed(0)
        trunk = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
        head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1))

        def run(module: nn.Module, value: Tensor, name: str) -> Tensor:
            return checkpoint(module, value, use_reentrant=False) if name == where else module(value)

        heads = {
            "a": lambda z, head=head: run(head, z, "head").square().mean(),
            "b": lambda z: z.square().mean(),
        }
        z = run(trunk, x, "trunk")
        if balanced:
            probe = ParameterProbe() if where == "trunk" else FeatureProbe()
            given = heads if form == "mapping" else lambda z, heads=heads: {t: h(z) for t, h in heads.items()}
            Balancer(["a", "b"], MGDA(), probe=probe)(z, given).backward()
        else:
            sum(loss(z) for loss in heads.values()).backward()
        counts.append((int(trunk[1].num_batches_tracked), int(head[0].num_batches_tracked)))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_head_that_writes_to_the_features_is_refused_in_evaluation_too(mode: Any) -> None:
    net = Net().float()
    balancer = Balancer(["a", "b"], MGDA()).eval()
    heads = {"a": lambda z: torch.relu_(z).mean(), "b": lambda z: z.mean()}
    with mode():
        z = net.trunk(points().float()) - 0.1
        with pytest.raises(ValueError, match="changed the features in place"):
            balancer(z, heads)
        balancer(z, {"a": lambda z: torch.relu(z).mean(), "b": lambda z: z.mean()})


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap(), ParameterProbe()], ids=repr)
def test_an_empty_batch_can_be_checked(probe: Probe) -> None:
    net = Net()
    balancer = Balancer(["a", "b"], MGDA(), probe=probe, check=True)
    heads = {"a": lambda z: net.head(z).sum(), "b": lambda z: (net.head(z) - 1).square().mean()}
    balancer(net.trunk(points()[:0]), heads, counts={"a": 0, "b": 0}).backward()
    assert balancer.report.weights == {"a": 0.0, "b": 0.0}


def test_a_scalar_times_zero_under_the_tap_blames_no_task() -> None:
    net = Net()
    heads = {"a": lambda z: net.head(z).square().mean(), "b": lambda z: (net.head(z) - 1).square().mean()}
    with pytest.raises(ValueError, match=r"factor 0 on a rank, as in \(0 \* loss\).*return None"):
        (0 * Balancer(["a", "b"], MGDA(), probe=FeatureTap())(net.trunk(points()), heads)).backward()
    holds = Balancer(["a", "b"], MGDA(), probe=FeatureTap(), on_nonfinite="hold")
    holds(net.trunk(points()), heads).backward()
    before = holds.weights
    net.zero_grad()
    (0 * holds(net.trunk(points()), heads)).backward()
    assert holds.weights == before
    assert bool(holds.report.held)
    assert not any(p.grad.any() for p in net.parameters())


@pytest.mark.parametrize("rule", [GeometricMean()], ids=repr)
def test_a_loss_of_exactly_zero_is_answered_with_none(rule: Any) -> None:
    net = Net()
    heads = {"a": lambda z: net.head(z).square().mean(), "b": lambda z: 0 * net.head(z).sum()}
    with pytest.raises(ValueError, match=r"got {'b': 0\.0}\. A loss of exactly 0 .* return None for it"):
        Balancer(["a", "b"], rule)(net.trunk(points()), heads)
    with pytest.raises(ValueError, match=r"got {'b': -1\.0}\. Add a constant"):
        Balancer(["a", "b"], rule)({"a": torch.tensor(1.0), "b": torch.tensor(-1.0)})

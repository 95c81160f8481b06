"""Probes against plain autograd, on one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from explicit import explicit_gram, explicit_weights, gradients
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, Equal, GeometricMean, Rule

TASKS = ("a", "b", "c")
WITH_HEADS = [FeatureProbe(), FeatureProbe(reevaluate=True)]  # weights reach the heads
ALL = [*WITH_HEADS, FeatureTap()]


class Net(nn.Module):
    """Three heads; with `noisy`, dropout and batch statistics in each."""

    def __init__(self, balancer: Balancer | None, *, noisy: bool = False) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 7))
        self.heads = nn.ModuleList([self._head(noisy) for _ in TASKS])

    @staticmethod
    def _head(noisy: bool) -> nn.Sequential:
        layers = [nn.BatchNorm1d(6), nn.Dropout(0.4)] if noisy else []
        return nn.Sequential(nn.Linear(7, 6), *layers, nn.Tanh(), nn.Linear(6, 1))

    def tasks(self, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        return {task: partial(self._loss, i, y[:, i] * 10**i) for i, task in enumerate(TASKS)}

    def _loss(self, i: int, target: Tensor, z: Tensor) -> Tensor:
        return F.mse_loss(self.heads[i](z).squeeze(-1), target)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.balancer(self.trunk(x), self.tasks(y))


def data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(12, 5, generator=generator), torch.randn(12, 3, generator=generator)
    return x.to(dtype), y.to(dtype)


def net(rule: Rule, probe: Probe | None, *, noisy: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(Balancer(TASKS, rule, probe=probe), noisy=noisy)


@pytest.mark.parametrize("probe", ALL, ids=repr)
@pytest.mark.parametrize("rule", [MGDA(), Equal(), GeometricMean()], ids=repr)
def test_statistics_and_weights_equal_explicit_autograd(rule: Rule, probe: Probe) -> None:
    x, y = data()
    model = net(rule, probe)
    model(x, y).backward()
    report = model.balancer.report
    with torch.no_grad():
        z = model.trunk(x)
    losses, gram = explicit_gram(z, model.tasks(y))
    torch.testing.assert_close(report.stats.losses, losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(report.stats.gram, gram, rtol=1e-6, atol=1e-6 * gram.diagonal().min().item())
    weights = explicit_weights(rule, z, model.tasks(y))
    torch.testing.assert_close(report.weight_vector, weights, rtol=1e-6, atol=0)
    assert list(report.weights.values()) == report.weight_vector.tolist()
    assert report.grad_norms == pytest.approx(dict(zip(TASKS, gram.diagonal().sqrt().tolist(), strict=True)))


@pytest.mark.parametrize("probe", WITH_HEADS, ids=repr)
def test_gradient_is_that_of_the_weighted_total(probe: Probe) -> None:
    x, y = data()
    model = net(MGDA(), probe)
    model(x, y).backward()
    got = gradients(model)
    weights = model.balancer.report.weights
    model.zero_grad()
    z = model.trunk(x)
    sum(weights[task] * loss(z) for task, loss in model.tasks(y).items()).backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


def test_tap_weighs_the_trunk_and_leaves_the_heads() -> None:
    x, y = data()
    model = net(MGDA(), FeatureTap())
    model(x, y).backward()
    got = gradients(model)
    weights = model.balancer.report.weights
    for weighted in (True, False):
        model.zero_grad()
        z = model.trunk(x)
        losses = {task: loss(z) for task, loss in model.tasks(y).items()}
        sum((weights[t] if weighted else 1.0) * loss for t, loss in losses.items()).backward()
        for name, expected in gradients(model).items():
            if name.startswith("trunk") == weighted:
                atol = 1e-6 * expected.abs().max().item()
                torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_loss_scale_and_accumulation_are_divided_out(probe: Probe) -> None:
    x, y = data()
    plain, scaled = net(MGDA(), probe), net(MGDA(), probe)
    plain(x, y).backward()
    (scaled(x, y) * 1024 / 4).backward()
    a, b = plain.balancer.report, scaled.balancer.report
    torch.testing.assert_close(a.stats.gram, b.stats.gram, rtol=1e-12, atol=0)
    assert a.weights == pytest.approx(b.weights, rel=1e-12)
    for name, expected in gradients(plain).items():
        assert torch.equal(gradients(scaled)[name], expected * 256), name


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_dropout_and_batch_statistics_as_if_heads_were_evaluated_once(probe: Probe) -> None:
    x, y = data()
    model = net(Equal(), probe, noisy=True)
    torch.manual_seed(11)
    total = model(x, y)
    total.backward()
    after = torch.rand(3)

    reference = net(Equal(), None, noisy=True)
    torch.manual_seed(11)
    z = reference.trunk(x)
    losses = {task: loss(z) for task, loss in reference.tasks(y).items()}
    (sum(losses.values()) / 3).backward()
    assert torch.equal(after, torch.rand(3)), "the generator moved on by another amount"
    for task, loss in losses.items():
        assert model.balancer.report.losses[task] == pytest.approx(loss.item(), rel=1e-6)
    for name, buffer in reference.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=0, atol=0)
    tap = isinstance(probe, FeatureTap)
    # of what was computed: the tap's heads have gradients, and rounding errors, three times as large
    largest = max(g.abs().max() for g in gradients(model).values())
    for name, expected in gradients(reference).items():
        factor = 3 if tap and name.startswith("heads") else 1  # the tap leaves the heads unweighted
        # of all gradients: a bias before batch normalisation has a gradient of rounding errors
        torch.testing.assert_close(
            gradients(model)[name], factor * expected, rtol=1e-5, atol=1e-6 * largest.item()
        )


def test_reevaluation_refuses_heads_that_are_not_reproducible() -> None:
    balancer = Balancer(["a"], MGDA(), probe=FeatureProbe(reevaluate=True))
    calls = iter([1.0, 1.5])
    with pytest.raises(RuntimeError, match=r"head of task 'a' gave .* and then .* must not depend on state"):
        balancer(torch.ones(3, requires_grad=True), {"a": lambda z: z.sum() * next(calls)})


def test_reevaluation_refuses_a_task_that_is_there_only_once() -> None:
    balancer = Balancer(["a"], MGDA(), probe=FeatureProbe(reevaluate=True))
    calls = iter([1.0])
    head = {"a": lambda z: z.sum() if next(calls, None) else None}
    with pytest.raises(RuntimeError, match=r"gave 3\.0 and then None"):
        balancer(torch.ones(3, requires_grad=True), head)


class Pair(NamedTuple):
    first: Tensor
    rest: dict[str, Tensor]
    mask: Tensor


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_features_are_any_pytree(probe: Probe) -> None:
    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    u, v = torch.randn(4, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    heads = {
        "a": lambda p: (p.first[p.mask] ** 2).sum() + p.rest["v"].sum(),
        "b": lambda p: 2 * p.rest["v"].square().sum() + 1,
    }
    balancer(Pair(u * 1, {"v": v * 1}, torch.tensor([True, False, True, True])), heads).backward()
    ga = torch.cat([2 * u.detach() * torch.tensor([1.0, 0, 1, 1]), torch.ones(6)])
    gb = torch.cat([torch.zeros(4), 4 * v.detach().flatten()])
    matrix = torch.stack([ga, gb]).double()
    torch.testing.assert_close(balancer.report.stats.gram, matrix @ matrix.T, rtol=1e-6, atol=1e-7)
    alpha = balancer.report.weight_vector
    mixed = (alpha @ matrix).float()
    torch.testing.assert_close(torch.cat([u.grad, v.grad.flatten()]), mixed)


@pytest.mark.parametrize("probe", WITH_HEADS, ids=repr)
def test_one_function_for_all_tasks_is_called_once_an_evaluation(probe: Probe) -> None:
    calls = []

    def decode(z: Tensor) -> dict[str, Tensor]:
        calls.append(1)
        hidden = z.exp()
        return {"a": hidden.sum(), "b": hidden.square().mean()}

    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    z = torch.randn(5, requires_grad=True)
    balancer(z * 1, decode).backward()
    assert len(calls) == (2 if probe.reevaluate else 1)
    torch.testing.assert_close(
        balancer.report.stats.gram, explicit_gram(z, {k: lambda z, k=k: decode(z)[k] for k in "ab"})[1]
    )


def test_tap_refuses_one_function_for_all_tasks() -> None:
    balancer = Balancer(["a"], MGDA(), probe=FeatureTap())
    with pytest.raises(TypeError, match="FeatureTap needs heads as a mapping"):
        balancer(torch.ones(2, requires_grad=True), lambda z: {"a": z.sum()})


def test_tap_refuses_a_second_backward() -> None:
    balancer = Balancer(["a"], MGDA(), probe=FeatureTap())
    loss = balancer(torch.ones(2, requires_grad=True) * 1, {"a": lambda z: z.sum()})
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_frozen_trunk_still_gives_statistics(probe: Probe) -> None:
    x, y = data()
    model = net(MGDA(), probe)
    model.trunk.requires_grad_(False)
    model(x, y).backward()
    _, gram = explicit_gram(model.trunk(x), model.tasks(y))
    torch.testing.assert_close(model.balancer.report.stats.gram, gram, rtol=1e-6, atol=1e-6)
    assert all(p.grad is not None for p in model.heads.parameters())


@pytest.mark.parametrize("probe", ALL, ids=repr)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_trunk(probe: Probe, use_reentrant: bool) -> None:
    x, y = data()
    plain, saved = net(MGDA(), probe), net(MGDA(), probe)
    plain(x, y).backward()
    z = checkpoint(saved.trunk, x.requires_grad_(), use_reentrant=use_reentrant)
    saved.balancer(z, saved.tasks(y)).backward()
    assert saved.balancer.report.weights == plain.balancer.report.weights
    for name, expected in gradients(plain).items():
        assert torch.equal(gradients(saved)[name], expected), name


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_a_task_apart_from_the_features_has_a_zero_gradient(probe: Probe) -> None:
    aside = torch.ones(2, requires_grad=True)
    balancer = Balancer(["a", "b"], Equal(), probe=probe)
    z = torch.ones(3, requires_grad=True)
    balancer(z * 1, {"a": lambda z: z.sum(), "b": lambda z: aside.sum()}).backward()
    assert balancer.report.grad_norms == {"a": pytest.approx(3**0.5), "b": 0.0}
    assert aside.grad is not None


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1.0, 1e12])
@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_small_gradients_do_not_underflow(probe: Probe, scale: float) -> None:
    x, y = data()
    model, small = net(MGDA(), probe), net(MGDA(), probe)
    model(x, y).backward()
    scaled = {task: (lambda z, f=f: scale * f(z)) for task, f in small.tasks(y).items()}
    small.balancer(small.trunk(x), scaled).backward()
    assert small.balancer.report.weights == pytest.approx(model.balancer.report.weights, rel=1e-5)
    for norm, expected in zip(
        small.balancer.report.grad_norms.values(), model.balancer.report.grad_norms.values(), strict=True
    ):
        assert norm == pytest.approx(scale * expected, rel=1e-5)


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_autocast_does_not_touch_the_statistics(probe: Probe) -> None:
    """bfloat16 features: the Gram is that of the bfloat16 gradients, not itself taken in bfloat16."""
    balancer = Balancer(["a", "b"], MGDA(), probe=probe)
    z = torch.randn(64, 33, requires_grad=True)
    targets = {"a": torch.randn(64, 33), "b": torch.randn(64, 33)}
    heads = {k: (lambda z, t=t: (z.float() * t).sum()) for k, t in targets.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        balancer(z.bfloat16(), heads).backward()
    rows = torch.stack([t.bfloat16().double().flatten() for t in targets.values()])
    torch.testing.assert_close(balancer.report.stats.gram, rows @ rows.T, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("probe", ALL, ids=repr)
def test_whole_model_compiled_breaks_once_and_stays_right(probe: Probe) -> None:
    x, y = data()
    plain, compiled = net(MGDA(), probe), net(MGDA(), probe)
    plain(x, y).backward()
    torch.compile(compiled, backend="aot_eager")(x, y).backward()
    assert compiled.balancer.report.weights == pytest.approx(plain.balancer.report.weights, rel=1e-5)
    for name, expected in gradients(plain).items():
        torch.testing.assert_close(gradients(compiled)[name], expected, rtol=1e-4, atol=1e-5)

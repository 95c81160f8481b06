"""Batches in which every sample has one task, on one process."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from explicit import gradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.engines import Engine
from mtl_dist.losses import GivenSampleLosses
from mtl_dist.probes import Probe
from mtl_dist.probes.shared_layer.products import grouped_products
from mtl_dist.weighting import MGDA, Equal, GeometricMean, InverseGradNorm, UPGrad

WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select"}


class Ops(TorchDispatchMode):
    """What ran, and whether something of it would have made the host wait for an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        indices = args[1] if name.startswith("index") and len(args) > 1 and isinstance(args[1], list) else []
        by_mask = any(isinstance(i, Tensor) and i.dtype == torch.bool for i in indices)
        if name in WAITS or by_mask:
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def names(n: int) -> list[str]:
    return [f"task{i}" for i in range(n)]


def problem(n: int, size: int = 40) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Features, ids, and the loss of every sample."""
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(size, 6, generator=generator)
    target = torch.randn(size, 6, generator=generator)
    ids = torch.randint(0, n, (size,), generator=generator)
    return z.requires_grad_(), ids, lambda z: (z.tanh() - target).square().sum(1)


def test_gram_at_the_features_is_diagonal_and_exact() -> None:
    z, ids, losses = problem(5)
    balancer = Balancer(names(5), MGDA())
    balancer(z, losses, task_ids=ids)
    each = losses(z)
    rows = [torch.autograd.grad(each[ids == i].mean(), z, retain_graph=True)[0].flatten() for i in range(5)]
    matrix = torch.stack(rows).double()
    torch.testing.assert_close(balancer.report.stats.gram, matrix @ matrix.T, rtol=1e-6, atol=0)
    expected = {f"task{i}": pytest.approx(each[ids == i].mean().item(), rel=1e-6) for i in range(5)}
    assert balancer.report.losses == expected


@pytest.mark.parametrize("probe", [FeatureProbe(), SharedLayerProbe(), SharedLayerProbe(sketch=20)], ids=repr)
def test_64_tasks_take_one_gradient_as_2_do(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: [calls.append("grad"), grad(*a, **k)][1])
    for n in (2, 64):
        calls.clear()
        z, ids, losses = problem(n, 200)

        def once(z: Tensor, losses: Callable[[Tensor], Tensor] = losses) -> Tensor:
            calls.append("heads")
            return losses(z)

        balancer = Balancer(names(n), InverseGradNorm(), probe=probe)
        balancer(z, once, task_ids=ids, layer=nn.Linear(6, 6)).backward()
        assert calls == ["heads", "grad"]
        assert z.grad is not None


def test_nothing_waits_for_the_device() -> None:
    z, ids, losses = problem(7)
    flags = []
    with Ops() as ops:
        heads = GivenSampleLosses(ids, None, names(7), lambda flag, _: flags.append(flag))
        collected = heads.at(losses(z))
        collected.stats(collected.gradients([z], torch.tensor(8.0)).gram())
        collected.total(torch.rand(7))
        grouped_products(torch.randn(40, 1, 3), torch.randn(40, 1, 4), ids, 7)
    assert ops.waits == []
    with Ops() as ops:
        bool(ids.sum() > 0)
        ids[ids > 2]
    assert len(ops.waits) >= 2, "the check cannot fail"


def test_tokens_masks_and_weights_of_samples() -> None:
    """The mean over unmasked tokens, all alike; a mask may hold weights; what it hides may be NaN."""
    x, ids = torch.randn(6, 4, 3, requires_grad=True), torch.tensor([0, 1, 1, 2, 0, -7])
    mask = torch.tensor([[1.0, 0.5, 2, 0]]).repeat(6, 1)
    mask[5] = 0
    hidden = (mask == 0)[..., None]

    def losses(z: Tensor) -> Tensor:
        return torch.where(hidden, torch.nan, z).square().sum(2)

    balancer = Balancer(names(3), Equal(), probe=FeatureProbe())
    total = balancer(x, losses, task_ids=ids, mask=mask)
    each = x.square().sum(2)
    own = [mask * (ids == i)[:, None] for i in range(3)]
    means = [(w * each).sum() / w.sum() for w in own]
    torch.testing.assert_close(total, sum(means) / 3)
    assert balancer.report.stats.counts.tolist() == [7.0, 7.0, 3.5]
    expected = [torch.autograd.grad(m, x, retain_graph=True)[0].norm().item() for m in means]
    assert list(balancer.report.grad_norms.values()) == pytest.approx(expected, rel=1e-6)


def test_ids_of_tokens() -> None:
    x, ids = torch.randn(3, 4, 5, requires_grad=True), torch.arange(12).view(3, 4) % 2
    layer = nn.Linear(5, 2)
    balancer = Balancer(names(2), MGDA(), probe=SharedLayerProbe())
    balancer(x, lambda z: z.square().sum(2), task_ids=ids, layer=layer)
    each = layer(x).square().sum(2)
    rows = [
        torch.autograd.grad(each[ids == i].mean(), layer.weight, retain_graph=True)[0].flatten()
        for i in (0, 1)
    ]
    matrix = torch.stack(rows).double()
    torch.testing.assert_close(balancer.report.stats.gram, matrix @ matrix.T, rtol=1e-5, atol=1e-7)


def test_a_convolution_as_the_shared_layer() -> None:
    x, ids, layer = torch.randn(8, 2, 5, 5), torch.arange(8) % 3, nn.Conv2d(2, 3, 3)
    balancer = Balancer(names(3), MGDA(), probe=SharedLayerProbe())
    balancer(x, lambda z: z.square().flatten(1).sum(1), task_ids=ids, layer=layer)
    each = layer(x).square().flatten(1).sum(1)
    rows = [
        torch.autograd.grad(each[ids == i].mean(), layer.weight, retain_graph=True)[0].flatten()
        for i in range(3)
    ]
    matrix = torch.stack(rows).double()
    torch.testing.assert_close(balancer.report.stats.gram, matrix @ matrix.T, rtol=1e-5, atol=1e-6)


def test_parameter_probe_takes_mixtures_too() -> None:
    torch.manual_seed(0)
    z, ids, losses = problem(3)
    trunk = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    balancer = Balancer(names(3), MGDA(), probe=ParameterProbe())
    balancer(trunk(z), losses, task_ids=ids).backward()
    each, parameters = losses(trunk(z)), list(trunk.parameters())
    rows = []
    for i in range(3):
        found = torch.autograd.grad(each[ids == i].mean(), parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    matrix = torch.stack(rows).double()
    torch.testing.assert_close(balancer.report.stats.gram, matrix @ matrix.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("probe", [FeatureProbe(), ParameterProbe()], ids=repr)
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_feature_that_no_loss_reads_and_a_loss_scale_change_nothing(probe: Probe, scale: float) -> None:
    grams = []
    for features in (1, 2):
        torch.manual_seed(0)
        trunk = nn.Linear(6, 6)
        z, ids, losses = problem(3)
        balancer = Balancer(names(3), MGDA(), probe=probe)
        if features == 2:
            balancer.set_engine(Engine(scaled=lambda value: value * scale))
        shared = trunk(z) if features == 1 else (trunk(z), z * 2)
        function = losses if features == 1 else lambda f, losses=losses: losses(f[0])
        balancer(shared, function, task_ids=ids)
        grams.append(balancer.report.stats.gram)
    torch.testing.assert_close(grams[1], grams[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [-100, 3, 10**6])
@pytest.mark.parametrize("probe", [FeatureProbe(), ParameterProbe(), SharedLayerProbe()], ids=repr)
def test_ids_of_masked_samples_may_be_anything(probe: Probe, wrong: int) -> None:
    z, ids, losses = problem(3)
    mask = torch.ones(40)
    mask[[4, 7]] = 0
    reports = []
    for value in (0, wrong):
        ids[[4, 7]] = value
        torch.manual_seed(0)
        layer = nn.Linear(6, 6)
        balancer = Balancer(names(3), MGDA(), probe=probe)
        balancer(z, losses, task_ids=ids, mask=mask, layer=layer).backward()
        reports.append((balancer.report.stats.gram, balancer.report.stats.losses, layer.weight.grad))
    for expected, got in zip(*reports, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("given", "mask", "total"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.bool, torch.float32),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_the_total_is_float32_or_that_of_float64_losses(
    given: torch.dtype, mask: torch.dtype | None, total: torch.dtype
) -> None:
    z, ids, losses = problem(3)
    ones = None if mask is None else torch.ones(40, dtype=mask)
    got = Balancer(names(3), Equal())(losses(z).to(given), task_ids=ids, mask=ones)
    assert got.dtype == total
    expected = sum(losses(z).to(given).to(total)[ids == i].mean() for i in range(3)) / 3
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", ["exact", "kernel"])
def test_a_mixture_on_a_layer_that_is_not_trained_has_a_gram_of_zeros(form: str) -> None:
    layer = nn.Linear(6, 6).requires_grad_(False)
    _, ids, losses = problem(3)
    balancer = Balancer(names(3), InverseGradNorm(), probe=SharedLayerProbe(form=form))
    balancer(torch.randn(40, 6), lambda z: losses(z.detach()), task_ids=ids, layer=layer)
    assert not balancer.report.stats.gram.any()


def test_a_batch_without_any_task_still_has_a_backward() -> None:
    trunk = nn.Linear(6, 6)
    z, ids, losses = problem(3)
    balancer = Balancer(names(3), MGDA(), probe=SharedLayerProbe())
    balancer(trunk(z), losses, task_ids=ids, mask=torch.zeros(40), layer=nn.Linear(6, 6)).backward()
    assert not gradients(trunk)["weight"].any()
    assert balancer.report.weights == dict.fromkeys(names(3), 0.0)


def test_losses_alone() -> None:
    z, ids, losses = problem(3)
    expected = Balancer(names(3), GeometricMean())
    each = losses(z)
    expected({f"task{i}": each[ids == i].mean() for i in range(3)})
    balancer = Balancer(names(3), GeometricMean())
    balancer(each, task_ids=ids).backward()
    assert balancer.report.weights == pytest.approx(expected.report.weights)
    with pytest.raises(ValueError, match="reads gradients"):
        Balancer(names(3), MGDA())(losses(z), task_ids=ids)


def test_eval_mode_takes_the_current_weights() -> None:
    z, ids, losses = problem(3)
    balancer = Balancer(names(3), MGDA())
    balancer(z, losses, task_ids=ids)
    weights = balancer.weights
    means = [losses(z)[ids == i].mean() for i in range(3)]
    expected = sum(weights[f"task{i}"] * mean for i, mean in enumerate(means))
    torch.testing.assert_close(balancer.eval()(z, losses, task_ids=ids), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("wrong", [3, -1])
def test_unknown_ids_are_refused(wrong: int, training: bool) -> None:
    z, ids, losses = problem(3)
    ids[4] = wrong
    balancer = Balancer(names(3), MGDA()).train(training)
    with pytest.raises(
        ValueError,
        match=re.escape(f"task_ids must be in 0 ... 2, indices into the balancer's tasks; got [{wrong}]"),
    ):
        balancer(z, losses, task_ids=ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"task_ids": torch.zeros(40)},
            "task_ids must be an integer tensor, one id per sample; got torch.float32",
        ),
        ({"task_ids": [0, 1]}, "task_ids must be an integer tensor"),
        ({"task_ids": torch.ones(40, dtype=torch.bool)}, "task_ids must be an integer tensor"),
        ({"task_ids": torch.tensor(0)}, "task_ids must be an integer tensor"),
        ({"task_ids": torch.zeros(39, dtype=torch.int64)}, r"must begin with the shape of task_ids, \(39,\)"),
        ({"task_ids": torch.zeros(40, dtype=torch.int64), "counts": {"task0": 1}}, "leave counts= out"),
        ({"mask": torch.ones(40)}, "mask= goes with task_ids="),
        (
            {"task_ids": torch.zeros(40, dtype=torch.int64), "mask": torch.ones(4)},
            r"the losses' shape, \(40,\)",
        ),
        (
            {"task_ids": torch.zeros(40, dtype=torch.int64), "mask": [1, 0]},
            r"the losses' shape, \(40,\); got \[1, 0\]",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    z, _, losses = problem(3)
    with pytest.raises(ValueError, match=message):
        Balancer(names(3), MGDA())(z, losses, **arguments)


def test_heads_that_do_not_fit_are_refused() -> None:
    z, ids, losses = problem(3)
    balancer = Balancer(names(3), MGDA())
    with pytest.raises(
        TypeError, match="heads is one function from the features to the loss of every sample"
    ):
        balancer(z, {"task0": losses}, task_ids=ids)
    with pytest.raises(ValueError, match="losses are one floating-point tensor with a loss for every sample"):
        balancer(z, lambda z: losses(z).mean(), task_ids=ids)
    with pytest.raises(ValueError, match="features must have one row per task id"):
        balancer(z.T, lambda z: losses(z.T), task_ids=ids)
    with pytest.raises(TypeError, match="FeatureTap needs heads as a mapping"):
        Balancer(names(3), MGDA(), probe=FeatureTap())(z, losses, task_ids=ids)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "exactly orthogonal" in r.getMessage()]


def test_a_blind_rule_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    balancer = Balancer(names(4), UPGrad())
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for step in range(40):
            assert len(warned(caplog)) == (step >= 8)
            z, ids, losses = problem(4)
            balancer(z, losses, task_ids=ids)
    (message,) = warned(caplog)
    for part in ("UPGrad", "FeatureProbe", "SharedLayerProbe()", "every sample belongs to one task"):
        assert part in message


def test_tasks_that_share_no_sample_are_noticed_without_ids(caplog: pytest.LogCaptureFixture) -> None:
    """Each batch has some of the tasks, in rows of their own; a step with one task says nothing."""
    balancer = Balancer(names(3), MGDA())
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for step in range(16):
            z = torch.randn(9, 4, requires_grad=True)
            heads = {f"task{i}": (lambda z, i=i: z[3 * i : 3 * i + 3].square().sum()) for i in range(3)}
            balancer(z, dict([*heads.items()][: 1 if step % 4 == 0 else 3]))
    assert len(warned(caplog)) == 1


@pytest.mark.parametrize("case", ["norms", "losses", "shared layer", "by chance", "underflow"])
def test_nobody_else_is_told(case: str, caplog: pytest.LogCaptureFixture) -> None:
    rule = {"norms": InverseGradNorm(), "losses": GeometricMean()}.get(case, MGDA())
    probe = SharedLayerProbe() if case == "shared layer" else FeatureProbe()
    balancer, layer = Balancer(names(4), rule, probe=probe), nn.Linear(6, 6)
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for step in range(33):
            z, ids, losses = problem(4)
            if case == "underflow":  # products of two norms would be zero in float64
                balancer(z, {f"task{i}": (lambda z, i=i: 1e-30 * z[:, i:].sum()) for i in range(4)})
            elif case == "by chance" and step % 8 == 7:
                balancer(z, {f"task{i}": (lambda z, f=losses: f(z).mean()) for i in range(4)})
            else:
                balancer(z, losses, task_ids=ids, layer=layer)
    assert warned(caplog) == []

"""Features of every kind: measured as plain autograd measures them, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, InverseGradNorm

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
PROBES = [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()]
Heads = dict[str, Callable[[Any], Tensor]]


def real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def gram_of(losses: list[Tensor], at: list[Tensor]) -> Tensor:
    rows = []
    for loss in losses:
        found = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, at, strict=True)]
        rows.append(torch.cat([real(part).flatten() for part in parts]).double())
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def measured(features: Any, heads: Heads, probe: Probe, **settings: Any) -> Tensor:
    balancer = Balancer(list(heads), MGDA(), probe=probe, **settings)
    balancer(features, heads).backward()
    return balancer.report.stats.gram


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6 * expected.diagonal().max().item())


@pytest.fixture
def layers() -> SimpleNamespace:
    torch.manual_seed(0)
    return SimpleNamespace(one=nn.Linear(6, 6), two=nn.Linear(6, 6), head=nn.Linear(4, 1))


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("probe", PROBES, ids=repr)
@pytest.mark.parametrize("alone", [False, True])
def test_complex_features_count_with_both_parts(
    layers: SimpleNamespace, probe: Probe, alone: bool, check: bool
) -> None:
    def make() -> Any:
        spectrum = torch.fft.rfft(layers.two(X))
        return (spectrum,) if alone else (spectrum, layers.one(X))

    heads: Heads = {
        "a": lambda f: layers.head(f[0].abs()).square().mean(),
        "b": lambda f: (f[0].real + 2 * f[0].imag + f[-1].real[:, :4]).square().mean(),
    }
    got = measured(make(), heads, probe, check=check)
    features = make()
    assert_same(got, gram_of([head(features) for head in heads.values()], list(features)))


def test_complex_features_of_a_mixture_count_with_both_parts(layers: SimpleNamespace) -> None:
    ids, balancer = torch.arange(8) % 2, Balancer(["a", "b"], InverseGradNorm())
    z = torch.fft.rfft(layers.one(X))

    def losses(z: Tensor) -> Tensor:
        return (z.real + 2 * z.imag).square().sum(1)

    balancer(z, losses, task_ids=ids)
    expected = gram_of([losses(z)[ids == i].mean() for i in (0, 1)], [z])
    assert_same(balancer.report.stats.gram, expected)


@pytest.mark.parametrize("bucket", [1, 1 << 22])
@pytest.mark.parametrize("sketch", [None, 4096])
def test_complex_and_sparse_parameters_count_as_they_are(
    layers: SimpleNamespace, bucket: int, sketch: int | None
) -> None:
    filters = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
    table = nn.Embedding(10, 6, sparse=True)
    ids = torch.arange(8) % 5

    def make() -> Tensor:
        return layers.one(torch.fft.irfft(torch.fft.rfft(table(ids)) * filters, n=6))

    heads: Heads = {
        "a": lambda z: layers.head(z[:, :4]).square().mean(),
        "b": lambda z: (z - 1).square().mean(),
    }
    got = measured(make(), heads, ParameterProbe(bucket=bucket, sketch=sketch))
    dense = nn.Embedding.from_pretrained(table.weight.detach(), freeze=False)
    z = layers.one(torch.fft.irfft(torch.fft.rfft(dense(ids)) * filters, n=6))
    at = [filters, dense.weight, *layers.one.parameters()]
    expected = gram_of([head(z) for head in heads.values()], at)
    if sketch is None:
        assert_same(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=0.2, atol=0.2 * expected.max().item())


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("probe", [*PROBES, ParameterProbe()], ids=repr)
def test_a_tensor_given_twice_is_one_tensor(layers: SimpleNamespace, probe: Probe, check: bool) -> None:
    heads: Heads = {
        "a": lambda f: layers.head(f["left"][:, :4]).square().mean(),
        "b": lambda f: (f["right"] - 1).square().mean(),
    }
    z = layers.one(X)
    got = measured({"left": z, "right": z}, heads, probe, check=check)
    z = layers.one(X)
    at = [z] if probe.at_features else list(layers.one.parameters())
    assert_same(got, gram_of([head({"left": z, "right": z}) for head in heads.values()], at))


def test_two_views_of_the_same_numbers_are_refused(layers: SimpleNamespace) -> None:
    z = layers.one(X)
    heads: Heads = {"a": lambda f: f[0].square().mean(), "b": lambda f: f[1].square().mean()}
    for features in ((z, z.view(4, 12)), (z.view(4, 12), z.view(8, 6)), (z, z.T)):
        with pytest.raises(ValueError, match="two views of the same numbers"):
            measured(features, heads, FeatureProbe())
    measured(z.chunk(2, dim=1), heads, FeatureProbe())  # parts of it are fine


@pytest.mark.parametrize("probe", [*PROBES, ParameterProbe()], ids=repr)
@pytest.mark.parametrize("kind", ["data", "input that is differentiated"])
def test_data_beside_the_features_does_not_count(layers: SimpleNamespace, probe: Probe, kind: str) -> None:
    data = 100 * torch.randn(8, 1)
    data.requires_grad_(kind != "data")
    heads: Heads = {
        "a": lambda f: (f[0] * f[1]).square().mean(),
        "b": lambda f: (f[0] - 1).square().mean(),
    }
    z = layers.one(X)
    got = measured((z, data), heads, probe)
    z = layers.one(X)
    at = [z] if probe.at_features else list(layers.one.parameters())
    assert_same(got, gram_of([head((z, data)) for head in heads.values()], at))


def test_features_of_a_frozen_trunk_all_count() -> None:
    z = (torch.randn(4, 2), torch.randn(4, 3))
    heads: Heads = {"a": lambda f: f[0].square().mean(), "b": lambda f: (f[0].sum() * f[1]).mean()}
    got = measured(z, heads, FeatureProbe())
    leaves = [t.clone().requires_grad_() for t in z]
    assert_same(got, gram_of([head(tuple(leaves)) for head in heads.values()], leaves))


class Colour(Enum):
    RED = 1


@dataclass
class Hidden:
    z: Tensor


@pytest.mark.parametrize("probe", [*PROBES, ParameterProbe()], ids=repr)
@pytest.mark.parametrize("beside", [False, True])
def test_an_object_whose_tensors_cannot_be_seen_is_refused(
    layers: SimpleNamespace, probe: Probe, beside: bool
) -> None:
    z = layers.one(X)
    for hidden in (Hidden(z), SimpleNamespace(z=z), lambda: z):
        features = (z, hidden) if beside or callable(hidden) else hidden
        with pytest.raises(ValueError, match=r"features hold a \w+, whose tensors cannot be seen"):
            measured(features, {"a": lambda f: z.mean(), "b": lambda f: z.mean()}, probe)


def test_plain_values_pass_through(layers: SimpleNamespace) -> None:
    plain = [None, True, 1, 2.0, 1j, "x", b"x", Colour.RED, torch.float32, torch.device("cpu"), slice(2)]
    plain += [np.float32(1), np.ones(2), X > 0, torch.arange(3), range(3)]
    seen: list[Any] = []

    def head(f: Any) -> Tensor:
        seen.append(f[1])
        return f[0].square().mean()

    measured((layers.one(X), plain), {"a": head, "b": lambda f: f[0].mean()}, FeatureProbe())
    assert all(got is given for got, given in zip(seen[0], plain, strict=True))


@pytest.mark.parametrize("probe", PROBES, ids=repr)
def test_parameters_as_features_are_refused_at_the_features(probe: Probe) -> None:
    """Ranks share them, so the sum over ranks would not be the norm of the sum."""
    p = nn.Parameter(torch.ones(3))
    heads: Heads = {"a": lambda p: p.sum(), "b": lambda p: p.square().sum()}
    with pytest.raises(ValueError, match=r"features hold a parameter.* use ParameterProbe\(\)"):
        measured(p, heads, probe)
    assert_same(measured(p, heads, ParameterProbe()), gram_of([head(p) for head in heads.values()], [p]))


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Padded(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(super().forward(x), (0, 1))


class Adapted(nn.Linear):
    """A low-rank adapter beside the weight, as LoRA merges it."""

    def __init__(self) -> None:
        super().__init__(6, 5)
        self.down, self.up = nn.Linear(6, 1), nn.Linear(1, 5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


def hooked(hook: Callable[..., Any], *, before: bool = False) -> nn.Module:
    layer = nn.Linear(6, 5)
    (layer.register_forward_pre_hook if before else layer.register_forward_hook)(hook)
    return layer


NOT_LINEAR = {
    "scaled": lambda: Scaled(6, 5),
    "activation": lambda: Activated(1, 2, 3),
    "another shape": lambda: Padded(6, 5),
    "adapter": Adapted,
    "hook that scales": lambda: hooked(lambda module, args, out: out * 1.01),
    "hook that masks": lambda: hooked(lambda module, args, out: out * torch.tensor([1.0, 1, 1, 1, 0])),
    "hook before": lambda: hooked(lambda module, args: (args[0].relu(),), before=True),
}
LINEAR = {
    "linear": lambda: nn.Linear(6, 5),
    "no bias": lambda: nn.Linear(6, 5, bias=False),
    "convolution": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "plain subclass": lambda: type("Plain", (nn.Linear,), {})(6, 5),
    "hook that looks": lambda: hooked(lambda module, args, out: None),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 5)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 5)),
}


def run_layer(layer: nn.Module, dtype: torch.dtype | None, rule: Any = None) -> Balancer:
    x = X.view(8, 1, 2, 3).repeat(1, 1, 2, 2) if isinstance(layer, nn.Conv2d) else X
    balancer = Balancer(["a", "b"], rule or MGDA(), probe=SharedLayerProbe())
    heads: Heads = {"a": lambda z: z.square().mean(), "b": lambda z: (z - 1).square().mean()}
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        for _ in range(2):
            balancer(x, heads, layer=layer).backward()
    return balancer


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", NOT_LINEAR)
def test_a_layer_that_is_not_linear_in_its_weight_is_refused(kind: str, dtype: torch.dtype | None) -> None:
    if kind == "hook that scales" and dtype is not None:
        return  # 1 % is within the rounding of these
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"the output of layer=\w+ is not its weight times its input"):
        run_layer(NOT_LINEAR[kind](), dtype)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", LINEAR)
def test_a_layer_that_is_linear_in_its_weight_is_taken(kind: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    layer = LINEAR[kind]()
    calls: list[int] = []
    layer.register_forward_hook(lambda module, args, out: calls.append(1))
    run_layer(layer, dtype)
    assert len(calls) == 2  # the comparison runs no hook


def test_layers_of_other_kinds_are_refused_in_words() -> None:
    with pytest.raises(TypeError, match="a convolution needs a batch"):
        Balancer(["a"], MGDA(), probe=SharedLayerProbe())(
            torch.randn(1, 5, 5), {"a": lambda z: z.mean()}, layer=nn.Conv2d(1, 2, 3)
        )
    with pytest.raises(TypeError, match="this one is complex"):
        Balancer(["a"], MGDA(), probe=SharedLayerProbe())(
            X.to(torch.cfloat), {"a": lambda z: z.abs().mean()}, layer=nn.Linear(6, 5, dtype=torch.cfloat)
        )

"""Heads that share what they make of the features, that read them elsewhere, or that write to them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from explicit import explicit_gram
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA

TASKS = ("a", "b", "c")
Heads = dict[str, Callable[[Tensor], Tensor]]


class Net(nn.Module):
    """Heads without a decoder, or with one that runs once and is kept."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(5, 7)
        self.decoder = nn.Linear(7, 6)
        self.side = nn.Linear(5, 6)  # trained too, and no part of the features
        self.tied = nn.Linear(6, 1)
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in TASKS)

    def apart(self, x: Tensor) -> Heads:
        """What they share is no function of the features: a parameter, and another network's output."""
        side = self.side(x).tanh()
        return {
            task: lambda z, i=i: (self.tied(self.decoder(z).tanh() + side) - i).square().mean()
            for i, task in enumerate(TASKS)
        }

    def cached(self) -> Heads:
        """The decoder's output, made by the first head, is read by all."""
        kept: dict[str, Tensor] = {}

        def decode(z: Tensor) -> Tensor:
            if "decoded" not in kept:
                kept["decoded"] = self.decoder(z).tanh()
            return kept["decoded"]

        return {
            task: lambda z, i=i: (self.heads[i](decode(z)) - i).square().mean()
            for i, task in enumerate(TASKS)
        }


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of outputs of each call of `torch.autograd.grad`."""
    calls: list[int] = []
    original = torch.autograd.grad

    def counted(outputs: object, *args: object, **kwargs: object) -> object:
        calls.append(len(outputs) if isinstance(outputs, list | tuple) else 1)
        return original(outputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


def measured(net: Net, x: Tensor, heads: Heads, probe: Probe) -> Tensor:
    balancer = Balancer(TASKS, MGDA(), probe=probe)
    balancer(net.trunk(x), heads).backward()
    return balancer.report.stats.gram


def assert_explicit(gram: Tensor, z: Tensor, make: Callable[[], Heads]) -> None:
    """Against heads that are made anew for each task, so that they share nothing."""
    _, expected = explicit_gram(z, {task: (lambda z, task=task: make()[task](z)) for task in TASKS})
    torch.testing.assert_close(gram, expected, rtol=1e-6, atol=1e-6 * expected.diagonal().max().item())


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureProbe(reevaluate=True), FeatureTap()], ids=repr)
def test_what_heads_share_besides_the_features_keeps_them_apart(probe: Probe, passes: list[int]) -> None:
    net, x = Net(), torch.randn(9, 5)
    gram = measured(net, x, net.apart(x), probe)
    assert passes == ([] if isinstance(probe, FeatureTap) else [3])
    assert_explicit(gram, net.trunk(x), lambda: net.apart(x))


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureProbe(reevaluate=True)], ids=repr)
def test_a_decoder_that_the_first_head_ran_for_all_is_taken_apart(probe: Probe, passes: list[int]) -> None:
    net, x = Net(), torch.randn(9, 5)
    heads = net.cached()
    if probe.reevaluate:  # a cache would hand the second evaluation the first one's graph
        made = heads
        heads = {task: (lambda z, task=task: made[task](z)) for task in TASKS}
        makes = iter([net.cached(), net.cached()])
        first = heads["a"]

        def renewed(z: Tensor) -> Tensor:
            made.update(next(makes))
            return first(z)

        heads["a"] = renewed
    gram = measured(net, x, heads, probe)
    assert passes == [1, 1, 1]
    assert_explicit(gram, net.trunk(x), net.cached)


def test_the_tap_refuses_such_a_decoder() -> None:
    net = Net()
    with pytest.raises(
        ValueError, match=r"(?s)loss of task 'b' depends on what the head of task 'a' computed"
    ):
        measured(net, torch.randn(9, 5), net.cached(), FeatureTap())


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap(), ParameterProbe()], ids=repr)
def test_features_read_past_the_argument_are_refused(probe: Probe) -> None:
    net, x = Net(), torch.randn(9, 5)
    z = net.trunk(x)
    heads = {**net.apart(x), "b": lambda own: own.square().mean() + z.square().mean()}
    with pytest.raises(ValueError, match="loss of task 'b' depends on the features other than through"):
        Balancer(TASKS, MGDA(), probe=probe)(z, heads)


def test_features_without_a_graph_may_be_read_anywhere() -> None:
    """A frozen trunk: nothing behind them is trained, but gradients at them count."""
    net, x = Net(), torch.randn(9, 5)
    z = net.trunk(x).detach()

    def heads() -> Heads:
        return {**net.apart(x), "b": lambda own: (own * z).square().mean()}

    balancer = Balancer(TASKS, MGDA())
    balancer(z, heads()).backward()
    assert_explicit(balancer.report.stats.gram, z, heads)


@pytest.mark.parametrize("probe", [FeatureProbe(), FeatureTap(), ParameterProbe()], ids=repr)
@pytest.mark.parametrize("task", TASKS)
def test_heads_that_write_to_the_features_are_refused(probe: Probe, task: str) -> None:
    net, x = Net(), torch.randn(9, 5)
    heads = {**net.apart(x), task: lambda z: torch.relu_(z).square().mean()}
    with pytest.raises((ValueError, RuntimeError), match=r"in place|in-?place"):
        measured(net, x, heads, probe)


def test_a_function_for_all_tasks_that_writes_to_the_features_is_refused() -> None:
    net = Net()

    def losses(z: Tensor) -> dict[str, Tensor]:
        decoded = net.decoder(torch.relu_(z))
        return {task: net.heads[i](decoded).square().mean() for i, task in enumerate(TASKS)}

    with pytest.raises(ValueError, match="changed the features in place"):
        Balancer(TASKS, MGDA())(net.trunk(torch.randn(9, 5)), losses)


def test_a_shared_layers_output_is_branched_too(passes: list[int]) -> None:
    net, x = Net(), torch.randn(9, 5)
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe())
    balancer(x, net.apart(x), layer=net.trunk).backward()
    assert passes == [3]
    rows = [
        torch.autograd.grad(h(net.trunk(x)), net.trunk.weight)[0].flatten() for h in net.apart(x).values()
    ]
    expected = torch.stack(rows).double() @ torch.stack(rows).double().T
    torch.testing.assert_close(balancer.report.stats.gram, expected, rtol=1e-6, atol=1e-6)

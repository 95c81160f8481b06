"""Balancers at several depths of one model (docs/usage.md) against explicit autograd of every loss.

On two virtual ranks the batch is uneven, 3 and 2 samples, and the result that of one process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtl_dist import Balancer
from mtl_dist.probes import FeatureTap, Probe
from mtl_dist.stats import TaskStats
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, InverseGradNorm, Rule

TASKS = ("depth", "normal", "edges")


class Above(nn.Module):
    """The upper level and the heads: features of the lower level -> losses of very different size."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Sequential(nn.Linear(8, 7), nn.Tanh())
        self.heads = nn.ModuleDict({task: nn.Linear(7, 2) for task in TASKS})

    def forward(self, z: Tensor, y: Tensor) -> dict[str, Tensor]:
        return self.losses(self.upper(z), y)

    def losses(self, high: Tensor, y: Tensor) -> dict[str, Tensor]:
        sizes, parts = (1.0, 0.1, 30.0), y.split(2, 1)
        return {
            task: size * (self.heads[task](high) - part).square().mean()
            for task, size, part in zip(TASKS, sizes, parts, strict=True)
        }


class Net(nn.Module):
    """Two levels, and three tasks on the upper one."""

    def __init__(self, low: Balancer | None = None, high: Balancer | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lower, self.above = nn.Sequential(nn.Linear(6, 8), nn.Tanh()), Above()
        # of a task that leaves at the lower level
        self.early = nn.Linear(8, 2)
        self.double()
        self.at_low, self.at_high = low, high


class Levels(Net):
    """Each level has weights of its own."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        counts = dict.fromkeys(TASKS, len(x))
        low = self.lower(x)
        # the upper level and the heads, cut off from the lower level
        loss = self.at_high(self.above.upper(low.detach()), lambda z: self.above.losses(z, y), counts=counts)
        # the lower level alone, through the same upper level and heads as constants
        constants = {name: value.detach() for name, value in self.above.named_parameters()}
        heads = lambda z: functional_call(self.above, constants, (z, y))  # noqa: E731
        return loss + self.at_low(low, heads, counts=counts)


class Nested(Net):
    """A task that leaves early, and a balanced group of those that leave late as one more task."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        def late(z: Tensor) -> Tensor:
            counts = dict.fromkeys(TASKS, len(x))
            return self.at_high(self.above.upper(z), lambda high: self.above.losses(high, y), counts=counts)

        heads = {"early": lambda z: self.early(z).square().mean(), "late": late}
        return self.at_low(self.lower(x), heads, counts={"early": len(x), "late": 1})


def batch() -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5, 6, generator=rng, dtype=torch.float64)
    return x, y


def weights_of(rule: Rule, losses: list[Tensor], at: Tensor) -> Tensor:
    """What the rule makes of explicit gradients of these losses at a tensor."""
    rows = torch.stack([torch.autograd.grad(loss, at, retain_graph=True)[0].flatten() for loss in losses])
    values, present = torch.stack(losses).detach(), torch.ones(len(losses), dtype=torch.bool)
    stats = TaskStats(values, present, rows @ rows.T, present.double())
    return rule.update(stats, rule.init([str(i) for i in range(len(losses))], at.device))[0]


def assert_gradients(part: nn.Module, total: Tensor, expected: nn.Module) -> None:
    wanted = torch.autograd.grad(total, list(expected.parameters()), retain_graph=True)
    for parameter, want in zip(part.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=1e-15)


def dot(weights: Tensor, losses: list[Tensor]) -> Tensor:
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def backward(net: Net, ranks: int = 1) -> None:
    if ranks == 1:
        net(*batch()).backward()
        return
    virtual = VirtualRanks(ranks, net.at_low, net)
    shards = virtual.split(batch())

    def work(rank: int) -> Tensor:
        loss = net(*shards[rank])
        (loss / ranks).backward()
        return loss.detach()

    virtual.run(work)


RULES = [(MGDA(), InverseGradNorm()), (InverseGradNorm(), MGDA())]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("of_low", "of_high"), RULES)
def test_each_level_has_its_own_weights(of_low: Rule, of_high: Rule, ranks: int) -> None:
    net, oracle, (x, y) = Levels(Balancer(TASKS, of_low), Balancer(TASKS, of_high)), Net(), batch()
    backward(net, ranks)
    low = oracle.lower(x)
    high = oracle.above.upper(low)
    losses = [*oracle.above.losses(high, y).values()]
    of_lower, of_upper = weights_of(of_low, losses, low), weights_of(of_high, losses, high)
    assert (of_lower / of_lower.sum() - of_upper / of_upper.sum()).abs().max() > 0.05
    assert_gradients(net.lower, dot(of_lower, losses), oracle.lower)
    assert_gradients(net.above, dot(of_upper, losses), oracle.above)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("of_low", "of_high"), RULES)
def test_a_balancer_inside_a_head_makes_one_task_of_its_tasks(
    of_low: Rule, of_high: Rule, ranks: int
) -> None:
    net, oracle = Nested(Balancer(["early", "late"], of_low), Balancer(TASKS, of_high)), Net()
    backward(net, ranks)
    x, y = batch()
    low = oracle.lower(x)
    high = oracle.above.upper(low)
    losses = [*oracle.above.losses(high, y).values()]
    inner = dot(weights_of(of_high, losses, high), losses)
    both = [oracle.early(low).square().mean(), inner]
    outer = weights_of(of_low, both, low)
    assert (outer > 0).all()
    for part in ("lower", "above", "early"):
        assert_gradients(getattr(net, part), dot(outer, both), getattr(oracle, part))
    assert set(net.at_high.report.weights) == set(TASKS)


def gradients_of(net: Net) -> list[Tensor]:
    return [p.grad for p in (*net.lower.parameters(), *net.above.upper.parameters())]


@pytest.mark.parametrize(
    ("kind", "of_low", "probe"),
    [(Levels, TASKS, None), (Nested, ("early", "late"), None), (Nested, ("early", "late"), FeatureTap())],
    ids=["levels", "nested", "nested under a tap"],
)
def test_with_a_lag_both_depths_use_the_weights_of_the_step_before(
    kind: type[Net], of_low: tuple[str, ...], probe: Probe | None
) -> None:
    """With the same batch in every step, these are the weights of the step itself."""
    plain, lagged = (
        kind(Balancer(of_low, MGDA(), probe=probe, lag=lag), Balancer(TASKS, InverseGradNorm(), lag=lag))
        for lag in (0, 1)
    )
    backward(plain)
    for _ in range(3):
        lagged.zero_grad()
        backward(lagged)
    for got, want in zip(gradients_of(lagged), gradients_of(plain), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-15)


def test_a_tap_inside_a_probe_is_refused() -> None:
    class Tapped(Net):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            late = {t: lambda high, t=t: self.above.losses(high, y)[t] for t in TASKS}
            heads = {"early": lambda z: self.early(z).square().mean()}
            return self.at_low(
                self.lower(x), heads | {"late": lambda z: self.at_high(self.above.upper(z), late)}
            )

    tap = Balancer(TASKS, MGDA(), probe=FeatureTap())
    with pytest.raises(RuntimeError, match="FeatureTap: a second backward through the same step"):
        backward(Tapped(Balancer(["early", "late"], MGDA()), tap))
    # under a tap its weights reach the upper level, and those of the outer one the lower level
    net = Tapped(*(Balancer(tasks, MGDA(), probe=FeatureTap()) for tasks in (["early", "late"], TASKS)))
    backward(net)
    oracle, (x, y) = Net(), batch()
    low = oracle.lower(x)
    high = oracle.above.upper(low)
    losses = [*oracle.above.losses(high, y).values()]
    inner = dot(weights_of(MGDA(), losses, high), losses)
    both = [oracle.early(low).square().mean(), inner]
    assert_gradients(net.above.upper, inner, oracle.above.upper)
    assert_gradients(net.lower, dot(weights_of(MGDA(), both, low), both), oracle.lower)

"""`balancer(losses, parameters=...)`: the Gram of the losses' gradients at any parameters."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, ParameterProbe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, Equal, InverseGradNorm

TASKS = ("pde", "edge")


class Field(nn.Module):
    """A network whose losses hold its derivatives."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(1, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        (curve,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
        return {
            "pde": (curve + self(x)).square().mean(),
            "edge": self(torch.ones_like(x[:1])).square().mean(),
        }


def explicit(losses: dict[str, Tensor], parameters: list[Tensor]) -> Tensor:
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]).double())
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("bucket", [4, 1 << 22])
@pytest.mark.parametrize("form", ["module", "tensors", "tensor"])
def test_the_gram_is_that_of_the_losses(form: str, bucket: int) -> None:
    net, x = Field(), torch.rand(16, 1)
    given = {"module": net, "tensors": net.first.parameters(), "tensor": net.last.weight}[form]
    wanted = {"module": list(net.parameters()), "tensors": list(net.first.parameters())}
    losses = net.losses(x)
    balancer = Balancer(TASKS, MGDA(), probe=ParameterProbe(bucket=bucket))
    total = balancer(losses, parameters=given)
    expected = explicit(losses, wanted.get(form, [net.last.weight]))
    torch.testing.assert_close(balancer.report.stats.gram, expected, rtol=1e-6, atol=0)
    weights = [balancer.report.weights[task] for task in TASKS]
    torch.testing.assert_close(total, sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)))
    total.backward()
    assert all(p.grad is not None for p in net.parameters())


def test_no_probe_is_needed_and_every_amortises() -> None:
    net, x = Field(), torch.rand(16, 1)
    Balancer(TASKS, InverseGradNorm())(net.losses(x), parameters=net).backward()
    balancer = Balancer(TASKS, InverseGradNorm(), probe=ParameterProbe(every=3))
    weights = []
    for step in range(4):
        balancer(net.losses(x + step), parameters=net).backward()
        weights.append(balancer.report.weights)
        assert bool(balancer.report.grad_norms) == (step % 3 == 0)
    assert weights[0] == weights[1] == weights[2] != weights[3]


@pytest.mark.parametrize("ids", [[0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1]], ids=["both", "one is absent"])
def test_losses_of_samples_are_measured_too(ids: list[int]) -> None:
    layer, x = nn.Linear(3, 2), torch.rand(6, 3)
    balancer = Balancer(TASKS, MGDA())
    losses = layer(x).square().sum(1)
    balancer(losses, task_ids=torch.tensor(ids), parameters=layer)
    by_task = {
        task: (losses * (torch.tensor(ids) == k)).sum() / max(1, ids.count(k)) for k, task in enumerate(TASKS)
    }
    expected = explicit(by_task, list(layer.parameters()))
    torch.testing.assert_close(balancer.report.stats.gram, expected, rtol=1e-6, atol=0)


def test_ranks_equal_one_process_also_with_different_counts() -> None:
    net, x = Field().double(), torch.rand(12, 1, dtype=torch.float64)
    shards = [x[:9], x[9:]]

    def losses(part: Tensor) -> dict[str, Tensor]:
        return {"pde": net.losses(part)["pde"], "edge": net(part).square().mean()}

    whole = Balancer(TASKS, MGDA())
    whole(losses(x), parameters=net).backward()
    expected = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    balancer = Balancer(TASKS, MGDA())

    def work(rank: int) -> Tensor:
        counts = dict.fromkeys(TASKS, len(shards[rank]))
        loss = balancer(losses(shards[rank]), counts=counts, parameters=net)
        (loss / 2).backward()
        return loss

    VirtualRanks(2, balancer, net).run(work)
    torch.testing.assert_close(balancer.report.stats.gram, whole.report.stats.gram, rtol=1e-10, atol=0)
    for parameter, gradient in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-16)


def test_a_rule_of_losses_measures_nothing_and_evaluation_neither() -> None:
    net, x = Field(), torch.rand(4, 1)
    balancer = Balancer(TASKS, Equal())
    balancer(net.losses(x), parameters=net)
    assert not balancer.report.grad_norms
    balancer = Balancer(TASKS, MGDA()).eval()
    assert balancer(net.losses(x), parameters=net).item() > 0
    assert balancer.step == 0


class Sharded(nn.Parameter):
    """Looks as a parameter of FSDP2 does."""

    def full_tensor(self) -> Tensor:
        return self.data


LINEAR = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("settings", "parameters", "error", "message"),
    [
        ({}, [1, 2], TypeError, r"parameters= is a module or tensors, .*got \['int'\]"),
        ({}, torch.zeros(3), ValueError, "none requires a gradient"),
        ({}, [LINEAR.weight * 2], ValueError, "holds a tensor that the graph computed"),
        ({}, LINEAR, ValueError, "no loss depends on any of the parameters="),
        (
            {},
            [Sharded(torch.zeros(2))],
            ValueError,
            "FSDP2 .or tensor parallelism. shards",
        ),
        ({"probe": FeatureProbe()}, LINEAR, ValueError, "parameters= is measured by ParameterProbe"),
        ({"window": 2}, LINEAR, ValueError, "window=2 adds the Grams of micro-batches"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    settings: dict[str, Any], parameters: Any, error: type[Exception], message: str
) -> None:
    net = Field()
    with pytest.raises(error, match=message):
        Balancer(TASKS, MGDA(), **settings)(net.losses(torch.rand(4, 1)), parameters=parameters)


def test_parameters_of_heads_are_refused() -> None:
    heads = {"pde": lambda z: z.sum(), "edge": lambda z: z.square().sum()}
    with pytest.raises(ValueError, match="parameters= goes with losses"):
        Balancer(TASKS, MGDA())(LINEAR(torch.rand(4, 1)), heads, parameters=LINEAR)


def test_partitioned_parameters_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.ds_status = "not available"
    with pytest.raises(ValueError, match="parameters that ZeRO-3 shards"):
        Balancer(TASKS, MGDA())(Field().losses(torch.rand(4, 1)), parameters=[parameter])


def test_a_loss_that_does_not_reach_them_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(1, 1)
    balancer = Balancer(TASKS, InverseGradNorm())
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for _ in range(3):
            losses = {"pde": layer(torch.ones(1, 1)).sum(), "edge": LINEAR(torch.ones(1, 1)).sum()}
            balancer(losses, parameters=layer)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert "the loss of task 'edge' does not depend on the parameters=" in said[0]

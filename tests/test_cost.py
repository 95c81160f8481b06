"""What a step costs, in numbers without noise: operators.

Times are in benchmarks/; these counts hold on every device. `tests/device` looks for what the host waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from operator_calls import beyond
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import InverseGradNorm, InverseLoss


class Net(nn.Module):
    """A trunk and n linear heads; without a rule a plain sum."""

    def __init__(self, n: int, rule: Rule | None = None, form: str = "heads", **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.last = nn.Linear(5, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(n))
        self.form = form
        self.tasks = [f"task{i}" for i in range(n)]
        self.balancer = None if rule is None else Balancer(self.tasks, rule, **settings)
        self.x, self.y = torch.randn(8, 5), torch.randn(8, n)

    def loss(self, i: int, z: Tensor) -> Tensor:
        return (self.heads[i](z)[:, 0] - self.y[:, i]).square().mean() + 0.1

    def forward(self) -> Tensor:
        h = self.trunk(self.x).tanh()
        if self.balancer is None:
            z = self.last(h)
            return sum((self.loss(i, z) for i in range(len(self.tasks))), torch.zeros(()))
        z = self.last(h)
        if self.form == "losses":
            return self.balancer({task: self.loss(i, z) for i, task in enumerate(self.tasks)})
        return self.balancer(z, {task: (lambda z, i=i: self.loss(i, z)) for i, task in enumerate(self.tasks)})


class TwoRanks:
    """Collectives of two ranks that hold the same numbers."""

    rank, world_size = 0, 2

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        buffer.mul_(2)
        return lambda: None

    def gather_text(self, text: str) -> list[str | None]:
        return [text, text]


def stepper(net: Net, *, ranks: bool = False) -> Callable[[], None]:
    """A training step without the optimizer, after three such steps."""
    if ranks and net.balancer is not None:
        net.balancer._synchronizer.use(TwoRanks())

    def step() -> None:
        net().backward()

    for _ in range(3):
        step()
    return step


# ---- operators ----------------------------------------------------------------------------------------

N = 8
BOUNDS = {
    "losses": (30, InverseLoss(), "losses", {}),
    "losses, lag": (30, InverseLoss(), "losses", {"lag": 1, "counts": "equal"}),
    "tap, lag": (30 + 3 * N, InverseGradNorm(), "heads", {"lag": 1, "counts": "equal"}),
    "FeatureProbe": (40 + 8 * N, InverseGradNorm(), "heads", {}),
}


@pytest.mark.parametrize("ranks", [False, True], ids=["one process", "two ranks"])
@pytest.mark.parametrize("name", BOUNDS)
def test_operators_beyond_the_plain_step(name: str, ranks: bool) -> None:
    bound, rule, form, settings = BOUNDS[name]
    step, plain = stepper(Net(N, rule, form, **settings), ranks=ranks), stepper(Net(N))
    # the stand-in's product is no part of the library
    assert beyond(step, plain) - ranks <= bound


def test_losses_alone_cost_no_more_for_more_tasks() -> None:
    costs = [beyond(stepper(Net(n, InverseLoss(), "losses")), stepper(Net(n))) for n in (4, 8, 32)]
    assert costs[2] <= costs[1] <= costs[0]  # a plain sum of n losses adds n - 1 times

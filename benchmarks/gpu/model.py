"""A small network with three tasks, the same on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist import RULES, Balancer, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.weighting import Rule

TASKS = ("number", "class", "vector")
BATCH, INPUTS, WIDTH, CLASSES = 12, 6, 16, 4


class Net(nn.Module):
    """A trunk, its last layer, and three heads; without a balancer the plain sum of the losses.

    Args:
        balancer: None for the plain sum.
        losses_only: the balancer receives losses, no features.
        dropout: in the heads.
    """

    def __init__(self, balancer: Balancer | None, *, losses_only: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.balancer, self.losses_only = balancer, losses_only
        self.trunk = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh())
        self.last = nn.Linear(WIDTH, WIDTH)
        sizes = (1, CLASSES, INPUTS)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Tanh(), nn.Dropout(dropout), nn.Linear(WIDTH, n)) for n in sizes
        )

    def loss(self, task: str, z: Tensor, x: Tensor, labels: Tensor) -> Tensor:
        """A positive mean loss."""
        out = self.heads[TASKS.index(task)](z).to(x.dtype)
        if task == "number":
            return F.mse_loss(out[:, 0], 1 + x[:, 0] * x[:, 1]) + 0.3
        if task == "class":
            return F.cross_entropy(out, labels)
        return 2 * F.mse_loss(out, x)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The scalar to differentiate."""
        if self.balancer is None:
            z = self.last(self.trunk(x))
            return torch.stack([self.loss(task, z, x, labels) for task in TASKS]).sum()
        if self.losses_only:
            z = self.last(self.trunk(x))
            return self.balancer({task: self.loss(task, z, x, labels) for task in TASKS})
        heads: dict[str, Callable[[Tensor], Tensor]] = {
            task: (lambda z, task=task: self.loss(task, z, x, labels)) for task in TASKS
        }
        if isinstance(self.balancer.probe, SharedLayerProbe):
            return self.balancer(self.trunk(x), heads, layer=self.last)
        return self.balancer(self.last(self.trunk(x)), heads)


def make(
    rule: Rule | None,
    probe: Probe | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float64,
    losses_only: bool = False,
    dropout: float = 0.0,
    **settings: Any,
) -> Net:
    """The same parameters on every device."""
    torch.manual_seed(7)
    balancer = None if rule is None else Balancer(TASKS, rule, probe=probe, **settings)
    return Net(balancer, losses_only=losses_only, dropout=dropout).to(device, dtype)


def batch(step: int, device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and classes of a step, the same on every device."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(BATCH, INPUTS, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    return x.to(device, dtype), labels.to(device)


def rule(name: str) -> Rule:
    """The example of a rule for these tasks, which the examples know as task0, task1, ..."""
    made: Rule = RULES[name].example(TASKS)
    return made


def stepper(net: Net, device: torch.device, dtype: torch.dtype = torch.float64) -> Callable[[int], Tensor]:
    """A training step by its number; its batches lie on the device, so the step copies nothing."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    batches = [batch(step, device, dtype) for step in range(4)]

    def step(number: int) -> Tensor:
        optimizer.zero_grad()
        total = net(*batches[number % len(batches)])
        total.backward()
        optimizer.step()
        return total.detach()

    return step

"""A physics-informed network for Burgers' equation: losses that hold derivatives of the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import Fixed, InverseGradNorm, Relative
from tests.gallery.loop import generator, train_loop
from tests.gallery.run import STEPS

PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), Relative(InverseGradNorm(), to="equation")
LINES = 2


def derivative(of: Tensor, by: Tensor) -> Tensor:
    return torch.autograd.grad(of.sum(), by, create_graph=True)[0]


class Burgers(nn.Module):
    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(["equation", "start", "edge"], rule)  # +

    def u(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([t, x], 1))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        t, x = batch["t"].requires_grad_(), batch["x"].requires_grad_()
        u, zero, one = self.u(t, x), torch.zeros_like(t), torch.ones_like(x)
        u_x = derivative(u, x)
        residual = derivative(u, t) + u * u_x - 0.05 * derivative(u_x, x)
        losses = {
            "equation": residual.square().mean(),
            "start": (self.u(zero, x) + torch.sin(torch.pi * x)).square().mean(),
            "edge": torch.cat([self.u(t, one), self.u(t, -one)]).square().mean(),
        }
        if self.balancer is None:
            return sum(losses.values())
        return self.balancer(losses, parameters=self.net)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    t, x = torch.rand(2, STEPS, 16, 1, generator=generator())
    batches = [{"t": t[k].clone(), "x": 2 * x[k] - 1} for k in range(steps)]
    return train_loop(Burgers(rule), batches, folder, resume)

"""A small model for the laws about faults, and what several of their tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import MGDA

TASKS = ("a", "b")


class Net(nn.Module):
    """A trunk and two linear heads."""

    def __init__(self, rule: Rule | None = None, **settings: Any) -> None:
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 8), nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
        self.balancer = Balancer(TASKS, rule or MGDA(), **settings)

    def losses(self, z: Tensor) -> dict[str, Tensor]:
        return {"a": self.heads["a"](z).square().mean(), "b": (self.heads["b"](z) - 1).square().mean()}

    def forward(self, x: Tensor) -> Tensor:
        heads = {
            "a": lambda z: self.heads["a"](z).square().mean(),
            "b": lambda z: (self.heads["b"](z) - 1).square().mean(),
        }
        return self.balancer(self.trunk(x).tanh(), heads)


def net(rule: Rule | None = None, **settings: Any) -> Net:
    """The same parameters at each call."""
    torch.manual_seed(0)
    return Net(rule, **settings)


def batch(seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))


def bad_batch() -> Tensor:
    x = batch()
    x[0, 0] = torch.nan
    return x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; zeros where a parameter has none. The model's gradients are cleared."""
    named = model.named_parameters()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}
    model.zero_grad()
    return found


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        error = (got[name] - value).abs().max()
        assert error <= 1e-7 + 1e-6 * value.abs().max(), f"{name} differs by {error}"

"""A recipe that trains in milliseconds, with a fault if one is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist.recipes import Metric, Recipe, TensorData, eval_sums


class Net(nn.Module):
    def __init__(self, balancer: nn.Module, tasks: tuple[str, ...], fault: str) -> None:
        super().__init__()
        self.balancer, self.tasks, self.fault = balancer, tasks, fault
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in tasks)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = self.trunk(x)
        if not self.training:
            errors = [(head(z).squeeze(1) - y).square() for head in self.heads]
            return EVAL.get(self.fault, lambda sums: sums)(eval_sums((error, error) for error in errors))
        heads = {
            task: lambda z, head=head: (head(z).squeeze(1) - y).square().mean()
            for task, head in zip(self.tasks, self.heads, strict=True)
        }
        return TRAIN.get(self.fault, lambda total: total)(self.balancer(z, heads))


EVAL = {
    "eval: a scalar": lambda sums: sums.sum(),
    "eval: one line": lambda sums: sums[:1],
    "eval: flat": lambda sums: sums.flatten(),
    "eval: two columns": lambda sums: sums[:, :2],
    "eval: nothing": lambda sums: None,
    "eval: whole numbers": lambda sums: sums.long(),
    "eval: NaN": lambda sums: sums * torch.nan,
    "eval: no number": lambda sums: sums,
}
TRAIN = {
    "train: nothing": lambda total: None,
    "train: a vector": lambda total: total.repeat(3),
    "train: two things": lambda total: (total, total),
    "train: no graph": lambda total: total.detach(),
}
DATA = {
    "data: one": lambda train, validation: train,
    "data: lists": lambda train, validation: ([1], [2]),
}
MODEL = {
    "model: nothing": lambda net: None,
    "model: frozen": lambda net: net.requires_grad_(False),
}


@dataclass(frozen=True)
class Tiny(Recipe):
    names: tuple[str, ...] = ("a", "b")
    metric: str = "mse"
    fault: str = ""

    @property
    def metrics(self) -> dict[str, Metric]:  # type: ignore[override]
        finish = (lambda mean: None) if self.fault == "eval: no number" else float
        return {name: Metric(self.metric, finish) for name in self.names}

    def data(self, seed: int) -> Any:
        draw = torch.Generator().manual_seed(seed)
        made = [
            TensorData({"x": torch.randn(n, 4, generator=draw), "y": torch.randn(n, generator=draw)})
            for n in (64, 16)
        ]
        return DATA.get(self.fault, lambda *both: both)(*made)

    def model(self, balancer: nn.Module) -> Any:
        return MODEL.get(self.fault, lambda net: net)(Net(balancer, self.names, self.fault))

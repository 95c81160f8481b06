"""Recommendation with a mixture of experts and one gate per task (MMoE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import MGDA, Fixed
from tests.gallery.loop import generator, train_loop
from tests.gallery.run import STEPS

PLAIN, RULE = Fixed([1.0, 1.0]), MGDA()
LINES = 2
TASKS = ("click", "buy")


class MMoE(nn.Module):
    """The gates read an embedding that is trained too, so it is a feature beside the experts' outputs."""

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 8) for _ in range(3)])
        self.gates = nn.ModuleDict({task: nn.Linear(6, 3) for task in TASKS})
        self.towers = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(TASKS, rule)  # +

    def loss(self, task: str, z: tuple[Tensor, Tensor], y: Tensor) -> Tensor:
        x, experts = z
        mixed = (self.gates[task](x).softmax(-1)[..., None] * experts).sum(1)
        return bce(self.towers[task](mixed)[:, 0], y[:, TASKS.index(task)])

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x = self.embedding(batch["item"])
        z = x, torch.stack([expert(x).relu() for expert in self.experts], 1)
        heads = {task: lambda z, task=task: self.loss(task, z, batch["y"]) for task in TASKS}
        if self.balancer is None:
            return sum(head(z) for head in heads.values())
        return self.balancer(z, heads)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    items = torch.randint(32, (STEPS, 16), generator=draw)
    labels = (torch.rand(STEPS, 16, 2, generator=draw) < 0.4).float()
    batches = [{"item": items[k], "y": labels[k]} for k in range(steps)]
    return train_loop(MMoE(rule), batches, folder, resume, lr=0.5)

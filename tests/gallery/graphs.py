"""Properties of small graphs, where most labels are missing: each task has its own number of labels."""

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

PLAIN, RULE = Fixed([1.0, 1.0, 1.0]), MGDA()
LINES = 3
TASKS = ("toxic", "soluble", "stable")


class Graphs(nn.Module):
    """Two rounds of messages, the mean over nodes, and one linear layer per property."""

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 8)
        self.outputs = nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(TASKS, rule)  # +

    def loss(self, task: str, z: Tensor, y: Tensor) -> Tensor | None:
        here = ~y.isnan()
        return bce(self.outputs[task](z)[here, 0], y[here]) if here.any() else None

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        edges, y = batch["edges"], batch["y"].unbind(1)
        z = self.second((edges @ self.first(edges @ batch["nodes"]).relu()).mean(1)).relu()
        heads = {task: lambda z, k=k: self.loss(TASKS[k], z, y[k]) for k, task in enumerate(TASKS)}
        if self.balancer is None:
            return sum(loss for head in heads.values() if (loss := head(z)) is not None)
        counts = {task: int((~y[k].isnan()).sum()) for k, task in enumerate(TASKS)}  # +
        return self.balancer(z, heads, counts=counts)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    nodes = torch.randn(STEPS, 12, 5, 4, generator=draw)
    edges = (torch.rand(STEPS, 12, 5, 5, generator=draw) < 0.4).float() / 2
    labels = (torch.rand(STEPS, 12, 3, generator=draw) < 0.5).float()
    labels[torch.rand(STEPS, 12, 3, generator=draw) < 0.7] = torch.nan
    batches = [{"nodes": nodes[k], "edges": edges[k], "y": labels[k]} for k in range(steps)]
    return train_loop(Graphs(rule), batches, folder, resume, lr=0.3, find_unused_parameters=True)

"""Lightning Fabric: a loop of one's own, with accumulation over two micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.integrations.lightning import attach
from mtl_dist.weighting import MGDA, Fixed, Smooth
from tests.gallery.run import DEVICE, STEPS, WORLD_SIZE, flat, mine

PLAIN, RULE = Fixed([1.0, 1.0]), Smooth(MGDA(), 0.5)
LINES = 3


class Net(nn.Module):
    """Two tasks on a shared trunk."""

    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.trunk, self.parity, self.size = nn.Linear(6, 8), nn.Linear(8, 2), nn.Linear(8, 1)
        self.balancer = None if rule is None else Balancer(["parity", "size"], rule)  # +

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x).relu()
        heads = {
            "parity": lambda z: nn.functional.cross_entropy(self.parity(z), (x[:, 0] > 0).long()),
            "size": lambda z: (self.size(z)[:, 0] - x.square().sum(1)).square().mean(),
        }
        if self.balancer is None:
            return sum(head(z) for head in heads.values())
        return self.balancer(z, heads)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    fabric = Fabric(accelerator=DEVICE, devices=WORLD_SIZE, strategy="ddp" if WORLD_SIZE > 1 else "auto")
    if WORLD_SIZE > 1:
        fabric.launch()
    torch.manual_seed(0)
    net = Net(rule)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    model, optimizer = fabric.setup(net, optimizer)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "step": 0}
    if rule is not None:
        attach(net.balancer, fabric)  # +
    file = folder.with_suffix(".ckpt")
    if resume:
        fabric.load(file, state)
    draw = torch.Generator().manual_seed(1)
    batches = torch.randn(STEPS, 2, 8, 6, generator=draw)
    losses = []
    for step in range(state["step"], steps):
        for micro, batch in enumerate(batches[step]):
            with fabric.no_backward_sync(model, enabled=micro == 0):
                loss = model(mine(batch)) / 2
                fabric.backward(loss)
            losses.append(loss.item() if WORLD_SIZE == 1 else 0.0)
        optimizer.step()
        optimizer.zero_grad()
    state["step"] = steps
    fabric.save(file, state)
    return {"parameters": flat(net), "losses": losses}

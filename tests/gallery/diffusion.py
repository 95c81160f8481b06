"""A diffusion model: tasks are ranges of the noise level, each sample has one of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Rule
from mtl_dist.weighting import InverseGradNorm, KeepNorm, TokenShare
from tests.gallery.loop import generator, train_loop
from tests.gallery.run import STEPS

PLAIN, RULE = TokenShare(), KeepNorm(InverseGradNorm(), like="tokens")
LINES = 2
LEVELS, TASKS = 1000, ("early", "middle", "late")


class Denoiser(nn.Module):
    def __init__(self, rule: Rule | None) -> None:
        super().__init__()
        self.level = nn.Linear(1, 8)
        self.first, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)
        self.balancer = None
        if rule is not None:
            self.balancer = Balancer(TASKS, rule)  # +

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        x, noise, t = batch["x"], batch["noise"], batch["t"]
        keep = (1 - t / LEVELS).view(-1, 1, 1, 1)
        noisy = keep.sqrt() * x + (1 - keep).sqrt() * noise
        hidden = self.first(noisy) + self.level(t[:, None] / LEVELS)[..., None, None]
        predicted = self.last(hidden.tanh())

        def losses(predicted: Tensor) -> Tensor:
            return (predicted - noise).square().mean((1, 2, 3))

        if self.balancer is None:
            return losses(predicted).mean()
        return self.balancer(predicted, losses, task_ids=t * len(TASKS) // LEVELS)  # +


def train(rule: Rule | None, folder: Path, steps: int, resume: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    draw = generator()
    x, noise = torch.randn(2, STEPS, 12, 1, 6, 6, generator=draw)
    t = torch.randint(LEVELS, (STEPS, 12), generator=draw)
    batches = [{"x": x[k], "noise": noise[k], "t": t[k]} for k in range(steps)]
    return train_loop(Denoiser(rule), batches, folder, resume)

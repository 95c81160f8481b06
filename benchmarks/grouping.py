"""Does training by groups help? Eight regressions with two known groups on one narrow trunk.

    python -m benchmarks.grouping            # minutes on two cores

The tasks of a group are similar combinations of four features of their group, with noise. The trunk has
half as many features as the two groups need together, so the groups compete for it. The losses of the
second group are ten times as large. `groups_study.py` says what is trained and how it is judged. The error
left is a part of the variance.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.groups_study import Data, Net, Study, main
from mtl_dist.weighting import MGDA, UPGrad

INPUTS, FEATURES, WIDTH = 12, 4, 64
NOISE, SCALE = 0.3, 10.0  # of the targets; of the losses of group b
OWN = 0.7  # size of the part of a task that the others of its group do not have


class Regressions(Study):
    """Each group has four features of its own."""

    name = "grouping"
    true = {group: tuple(f"{group}{number}" for number in range(4)) for group in "ab"}
    rates = (1e-3, 3e-3, 1e-2)
    batch = 64
    left = "error left"
    gram = {"mgda": MGDA(), "upgrad": UPGrad()}

    def draw(self, seed: int) -> Data:
        """A new problem for each seed."""
        rng = torch.Generator().manual_seed(1000 + seed)
        first = torch.randn(2, INPUTS, FEATURES, generator=rng) / INPUTS**0.5 * 1.5
        # the tasks of a group have a common part, so their gradients agree
        own, common = (torch.randn(2, FEATURES, num, generator=rng) for num in (4, 1))
        second = (common + OWN * own) / FEATURES**0.5

        def draw(num: int) -> tuple[Tensor, Tensor]:
            x = torch.randn(num, INPUTS, generator=rng)
            y = torch.cat([torch.tanh(x @ a) @ b for a, b in zip(first, second, strict=True)], 1)
            return x, y + NOISE * torch.randn(y.shape, generator=rng)

        return Data(draw(512), draw(1024), draw(4096))

    def net(self, tasks: tuple[str, ...]) -> Net:
        """A trunk with few features."""
        trunk = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, FEATURES), nn.Tanh())
        return Net(trunk, FEATURES, tasks)

    def loss(self, task: str, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, ten times as large in group b."""
        return (SCALE if task in self.true["b"] else 1.0) * (output - target).square().mean()

    def error(self, output: Tensor, target: Tensor) -> float:
        """Mean squared error divided by the variance of the target."""
        return float((output - target).square().mean() / target.var())


if __name__ == "__main__":
    main(Regressions(), __doc__ or "", steps=200)

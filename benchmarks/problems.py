"""The models of overhead.py: a trunk, its last layer, and linear heads, decoders, or one language-model head.

The plain step takes 10 to 200 ms on one core, so that a row of the table takes seconds; `tiny` takes 1 ms.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mtl_dist import Balancer, SharedLayerProbe

CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """Size of the linear problem; the defaults give a trunk of 5.3 million parameters."""

    tasks: int = 8
    batch: int = 64
    width: int = 1024
    depth: int = 5
    features: int = 512


class Problem(nn.Module):
    """A network with shared parameters and heads, and its training batches.

    Attributes:
        tasks: n.
        batch: samples per rank.
        trunk: the shared layers but for the last one.
        last: the last shared layer; its output are the features.
        heads: what is not shared.
        balancer: None for a plain sum of the losses.
        meets: whether the plain step makes one all-reduce of its losses, whose result is not used.
    """

    trunk: nn.Module
    last: nn.Module
    heads: nn.ModuleList

    def __init__(self, tasks: int, batch: int) -> None:
        super().__init__()
        self.tasks = tasks
        self.batch = batch
        self.balancer: Balancer | None = None
        self.meets = False

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs and labels of one step."""
        raise NotImplementedError

    def losses(self, z: Tensor, y: Tensor) -> list[Tensor]:
        """The n losses, scalars."""
        return [self.loss(i, z, y) for i in range(self.tasks)]

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        """The loss of one task."""
        raise NotImplementedError

    def balanced(self, features: Tensor, y: Tensor, **layer: nn.Module) -> Tensor:
        """The scalar of the balancer, with one head per task."""
        heads: dict[str, Callable[[Tensor], Tensor]] = {
            str(i): (lambda z, i=i: self.loss(i, z, y)) for i in range(self.tasks)
        }
        total: Tensor = self.balancer(features, heads, **layer)
        return total

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The scalar to differentiate."""
        hidden = self.trunk(x)
        if self.balancer is None:
            losses = self.losses(self.last(hidden), y)
            if self.meets:
                dist.all_reduce(torch.stack([loss.detach() for loss in losses]).double())
            return sum(losses, torch.zeros((), device=x.device))
        if isinstance(self.balancer.probe, SharedLayerProbe):
            return self.balanced(hidden, y, layer=self.last)
        return self.balanced(self.last(hidden), y)


class Linear(Problem):
    """An MLP, and one linear classifier per task: heads that cost next to nothing."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape.tasks, shape.batch)
        self.inputs = shape.features
        widths = [shape.features, *[shape.width] * shape.depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.last = nn.Linear(shape.width, shape.features)
        self.heads = nn.ModuleList(nn.Linear(shape.features, CLASSES) for _ in range(shape.tasks))

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Vectors, and one class per task."""
        x = torch.randn(self.batch, self.inputs, device=device)
        return x, torch.randint(CLASSES, (self.batch, self.tasks), device=device)

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self.heads[i](z), y[:, i])


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.ReLU())


class Decoders(Problem):
    """Four convolution blocks, and one decoder per task of two blocks and a projection, on 48 x 48 images.

    Two decoders are as much work as the trunk.
    """

    size = 48

    def __init__(self, tasks: int, batch: int, channels: int = 8) -> None:
        super().__init__(tasks, batch)
        self.trunk = nn.Sequential(_block(3, channels), *(_block(channels, channels) for _ in range(2)))
        self.last = nn.Conv2d(channels, channels, 3, padding=1)
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.ReLU(), *(_block(channels, channels) for _ in range(2)), nn.Conv2d(channels, 1, 1)
            )
            for _ in range(tasks)
        )

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Images, and one map of numbers per task."""
        x = torch.randn(self.batch, 3, self.size, self.size, device=device)
        return x, torch.randn(self.batch, self.tasks, self.size, self.size, device=device)

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        """Squared error."""
        return F.mse_loss(self.heads[i](z), y[:, i : i + 1])


class LanguageModel(Problem):
    """A transformer with one language-model head; every text belongs to one task.

    All ranks have the same number of texts of each task. There is one head for all tasks, so that
    `FeatureTap`, which needs one per task, refuses it.
    """

    vocabulary, length = 2048, 16

    def __init__(self, tasks: int, batch: int, width: int = 96, depth: int = 3) -> None:
        super().__init__(tasks, batch)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.trunk = nn.Sequential(
            nn.Embedding(self.vocabulary, width),
            nn.TransformerEncoder(layer, depth, enable_nested_tensor=False),
        )
        self.last = nn.Linear(width, width)
        self.heads = nn.ModuleList([nn.Linear(width, self.vocabulary)])

    def draw(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Tokens, and the tokens to predict."""
        shape = (self.batch, self.length)
        x, y = (torch.randint(self.vocabulary, shape, device=device) for _ in range(2))
        return x, y

    def _tokens(self, z: Tensor, y: Tensor) -> Tensor:
        """`[B, S]`: the loss of each token."""
        logits = self.heads[0](z)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)

    def _ids(self, y: Tensor) -> Tensor:
        """`[B]`: the task of each text."""
        return torch.arange(self.batch, device=y.device) % self.tasks

    def losses(self, z: Tensor, y: Tensor) -> list[Tensor]:
        """Means over the tokens of each task."""
        texts, ids = self._tokens(z, y).mean(1), self._ids(y)
        sums = texts.new_zeros(self.tasks).index_add(0, ids, texts)
        return list(sums / ids.bincount(minlength=self.tasks))

    def balanced(self, features: Tensor, y: Tensor, **layer: nn.Module) -> Tensor:
        """The scalar of the balancer, with the task of each text."""
        options: dict[str, Any] = {"task_ids": self._ids(y), **layer}
        total: Tensor = self.balancer(features, lambda z: self._tokens(z, y), **options)
        return total


PROBLEMS: dict[str, Callable[[int, int | None], Problem]] = {
    "linear": lambda tasks, batch: Linear(Shape(tasks=tasks, batch=batch or Shape.batch)),
    "tiny": lambda tasks, batch: Linear(Shape(tasks=tasks, batch=batch or 4, width=8, depth=1, features=8)),
    "decoder": lambda tasks, batch: Decoders(tasks, batch or 3),
    "lm": lambda tasks, batch: LanguageModel(tasks, batch or 32),
}

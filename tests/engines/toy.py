"""A small network with three tasks, and batches that can be dealt to ranks and micro-batches."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from cells import Cell
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer

DEVICE = torch.device(os.environ.get("CELLS_DEVICE", "cpu"))  # "cuda": benchmarks/gpu
TASKS = ("number", "class", "vector")
MICRO_BATCH = 16  # samples over all ranks
WIDTH = 16


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)).tanh()


class Trunk(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, WIDTH), Block(), Block())


@dataclass(frozen=True)
class Batch:
    """Samples of one rank; `has_class` marks those with a label of the second task."""

    inputs: Tensor
    numbers: Tensor
    classes: Tensor
    has_class: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, field.name).to(device) for field in fields(self)))

    def rows(self, index: slice) -> Batch:
        return Batch(self.inputs[index], self.numbers[index], self.classes[index], self.has_class[index])


class Net(nn.Module):
    """A trunk and three heads; without a balancer the plain sum of the losses."""

    def __init__(self, balancer: Balancer | None, cell: Cell) -> None:
        super().__init__()
        self.cell = cell
        self.balancer = balancer
        self.trunk = Trunk()
        self.heads = nn.ModuleList(
            [
                nn.Linear(WIDTH, 1, bias=False),
                nn.Linear(WIDTH, 4),
                nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 5)),
            ]
        )

    def features(self, x: Tensor) -> Tensor:
        if self.cell.checkpoint == "none":
            return self.trunk(x)
        reentrant = self.cell.checkpoint == "reentrant"
        if reentrant:
            x = x.detach().requires_grad_()  # a reentrant checkpoint needs an input that requires gradients
        return checkpoint(self.trunk, x, use_reentrant=reentrant)

    def losses(self, batch: Batch) -> dict[str, Callable[[Tensor], Tensor]]:
        """Every head is evaluated on every rank, on no row where there is no sample."""
        return {
            "number": lambda z: (
                0.5 * F.mse_loss(self.heads[0](z).float().squeeze(-1), batch.numbers.float()) + 0.3
            ),
            "class": lambda z: F.cross_entropy(
                self.heads[1](z[batch.has_class]).float(), batch.classes[batch.has_class]
            ),
            "vector": lambda z: 2 * F.mse_loss(self.heads[2](z).float(), batch.inputs[:, :5].float()),
        }

    def counts(self, batch: Batch) -> dict[str, float | Tensor] | None:
        if self.cell.data == "even":
            return None
        samples = len(batch.inputs)
        return {"number": samples, "class": batch.has_class.sum(), "vector": samples}

    def forward(self, batch: Batch) -> Tensor:
        z = self.features(batch.inputs.to(self.dtype))
        heads = self.losses(batch)
        if self.balancer is None:
            return torch.stack([head(z) for head in heads.values()]).sum()
        if self.cell.probe == "losses":
            return self.balancer({task: head(z) for task, head in heads.items()}, counts=self.counts(batch))
        return self.balancer(z, heads, counts=self.counts(batch))

    @property
    def dtype(self) -> torch.dtype:
        """DeepSpeed casts parameters to bf16, and leaves inputs to the model."""
        return self.trunk[0].weight.dtype


def global_batch(step: int, micro: int, data: str) -> Batch:
    """One micro-batch of all ranks."""
    generator = torch.Generator().manual_seed(1000 + 16 * step + micro)
    inputs = torch.randn(MICRO_BATCH, 6, generator=generator)
    numbers = 1 + inputs[:, 0] * inputs[:, 1]
    classes = torch.randint(0, 4, (MICRO_BATCH,), generator=generator)
    has_class = torch.ones(MICRO_BATCH, dtype=torch.bool)
    if data == "ragged":
        has_class = torch.arange(MICRO_BATCH) < 3 + step % 4  # the last rank has none at most steps
    return Batch(inputs, numbers, classes, has_class)


def shard(batch: Batch, rank: int, world_size: int, data: str) -> Batch:
    """The rows of one rank."""
    edges = [MICRO_BATCH * r // world_size for r in range(world_size + 1)]
    if data == "ragged" and world_size > 1:
        edges[1] = 5 * edges[1] // 8 or 1
    return batch.rows(slice(edges[rank], edges[rank + 1]))

"""SharedLayerProbe under every engine; compares with explicit autograd on the whole batch in each process.

    shared_layer_engines.py FAMILY

FAMILY is `torch` (DDP and FSDP2) or `deepspeed` (ZeRO 0-3). Prints one line a cell, as parameter_engines.py.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import parameter_engines as engines
import torch
from parameter_engines import TASKS, WIDTH, ddp, fsdp2, zero
from ranks import start, stop
from torch import Tensor, nn

from mtl_dist import Balancer, SharedLayerProbe

SEVERAL, ONE = "each sample has every task", "each sample has one task"


class LayerNet(engines.Net):
    """The trunk ends in a linear layer; samples have every task, or one each."""

    def __init__(self, balancer: Balancer, *, mixed: bool = False, **options: bool) -> None:
        super().__init__(balancer, **options)
        self.mixed = mixed
        self.trunk.append(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for block in self.trunk[:-1]:
            x = block(x)
        if self.mixed:
            return self.balancer(x, lambda z: self.each(z, y), layer=self.trunk[-1], task_ids=ids_of(y))
        counts = dict.fromkeys(TASKS, len(x))
        counts[TASKS[-1]] *= engines.RANK < engines.WORLD_SIZE - 1
        return self.balancer(x, self.losses(y), layer=self.trunk[-1], counts=counts)

    def each(self, z: Tensor, y: Tensor) -> Tensor:
        """`[B]`, the loss of every sample in its own task."""
        errors = torch.cat([head(z) for head in self.heads], dim=1) - y
        factors = torch.tensor([0.1, 1.1, 2.1])
        return (factors * errors.square()).gather(1, ids_of(y)[:, None]).squeeze(1)


def ids_of(y: Tensor) -> Tensor:
    """The task of each sample, from its labels, so that shards agree with the whole."""
    return y.argmax(1)


class LayerReference(engines.Reference):
    def shared(self) -> list[Tensor]:
        return [self.net.trunk[-1].weight]

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        if not self.net.mixed:
            return super().gram(x, y)
        each, ids = self.net.each(self.net.trunk(x), y), ids_of(y)
        self.now = {task: each[ids == i].mean() for i, task in enumerate(TASKS)}
        rows = [
            torch.autograd.grad(loss, self.shared(), retain_graph=True)[0].flatten()
            for loss in self.now.values()
        ]
        matrix = torch.stack(rows).double()
        return matrix @ matrix.T


def cells(names: dict[str, Callable]) -> None:
    for name, wrap in names.items():
        # the other two pairs are in shared_layer.py: engines do not tell them apart
        for mixed, form in ((False, "exact"), (True, "kernel")):
            title = f"{name}, {ONE if mixed else SEVERAL}, {form}"
            engines.run(title, SharedLayerProbe(form=form), wrap, mixed=mixed)


FAMILIES = {
    "torch": {
        "ddp": ddp(),
        "ddp, static_graph": ddp(static_graph=True),
        "fsdp2 layers": fsdp2("layers"),
        "fsdp2 root only": fsdp2("root only"),
        "fsdp2 later layers in the root": fsdp2("later layers in the root"),
    },
    "deepspeed": {f"zero-{stage}": zero(stage) for stage in range(4)},
}


def main() -> None:
    engines.RANK, engines.WORLD_SIZE = start()
    engines.Net, engines.Reference = LayerNet, LayerReference
    cells(FAMILIES[sys.argv[1]])
    gc.collect()
    stop()


if __name__ == "__main__":
    main()

"""What is trained on the stand-in device, and collectives of two ranks that hold the same numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import stand_in
import torch
from stand_in import Far
from torch import Tensor, nn

from mtl_dist import Balancer, SharedLayerProbe

TASKS = ("task0", "task1", "task2")
ROWS = 8


class TwoRanks:
    """Collectives as NCCL's: in a stream of their own, for which the waiting stream waits."""

    rank, world_size = 0, 2

    def __init__(self) -> None:
        self.stream = stand_in.Stream()

    @contextlib.contextmanager
    def aside(self, *tensors: Tensor) -> Iterator[None]:
        self.stream.wait_stream(stand_in.current())
        for tensor in tensors:
            if isinstance(tensor, Far):
                tensor.record_stream(self.stream)
        with self.stream:
            yield

    def wait(self) -> None:
        stand_in.current().wait_stream(self.stream)

    def start_all_reduce(self, buffer: Tensor) -> Callable[[], None]:
        with self.aside(buffer):
            buffer.mul_(2)
        return self.wait

    def reduce_scatter(self, mine: Tensor, by_rank: Tensor) -> None:
        with self.aside(mine, by_rank):
            mine.copy_(by_rank[0] * 2)
        self.wait()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone(), tensor.clone()]

    def gather_text(self, text: str) -> list[str | None]:
        return [text, text]

    def all_reduce_and_leave(self, buffer: Tensor) -> None:
        """Nobody else is there."""


class Net(nn.Module):
    """A trunk, a shared layer, and linear heads with dropout."""

    def __init__(self, balancer: Balancer, form: str, dropout: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.last = nn.Linear(5, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in TASKS)
        self.balancer, self.form, self.dropout = balancer, form, nn.Dropout(dropout)
        self.calls = 0
        balancer._synchronizer.use(TwoRanks())

    def loss(self, i: int, z: Tensor, y: Tensor) -> Tensor:
        return (self.heads[i](self.dropout(z))[:, 0] - y[:, i]).square().mean() + 0.1

    def losses(self, z: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {task: self.loss(i, z, y) for i, task in enumerate(TASKS)}

    def forward(self, x: Tensor, y: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.trunk(x).tanh()
        layered = isinstance(self.balancer.probe, SharedLayerProbe)
        z, layer = (h, {"layer": self.last}) if layered else (self.last(h), {})
        if self.form.startswith("losses"):
            losses = self.losses(z, y)
            at = {"parameters": self.trunk.parameters()} if self.form == "losses, parameters" else {}
            return self.balancer(losses, **at)
        if self.form.startswith("mixture"):
            masked = {"mask": mask} if self.form == "mixture, mask" else {}
            return self.balancer(z, lambda z: self.by_row(z, y, ids), task_ids=ids, **masked, **layer)
        if self.form == "one function":
            return self.balancer(z, lambda z: self.losses(z, y), **layer)
        heads = {task: (lambda z, i=i: self.loss(i, z, y)) for i, task in enumerate(TASKS)}
        absent = {"an absent task": TASKS[1:2], "no sample": TASKS}.get(self.form, ())
        heads |= dict.fromkeys(absent, lambda z: None)
        counts = None
        if self.form in ("counts on the device", "some of both"):
            counts = {task: (mask * (ids == i)).sum() for i, task in enumerate(TASKS)}
        if self.form in ("counts on the host", "some of both"):
            self.calls += 1
            counts = {**(counts or {}), **dict.fromkeys(TASKS[(counts is not None) :], self.calls + 0.5)}
        return self.balancer(z, heads, counts=counts, **layer)

    def by_row(self, z: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        out = torch.stack([head(self.dropout(z))[:, 0] for head in self.heads], 1)
        return (out - y).square().gather(1, ids.clamp(max=len(TASKS) - 1)[:, None])[:, 0] + 0.1


def batch(step: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 5, generator=random), torch.randn(ROWS, len(TASKS), generator=random)
    return x, y, torch.arange(ROWS) % len(TASKS), (torch.arange(ROWS) != step % ROWS).float()

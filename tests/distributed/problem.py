"""A small multi-task problem whose global batches can be dealt to any number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TASKS = ("task0", "task1", "task2")
BATCH = 24


class Net(nn.Module):
    """A trunk, one head a task; the losses differ in scale, and are all positive."""

    def __init__(self, balancer: nn.Module) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh())
        last = nn.Sequential(nn.Linear(8, 5), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 4), last])

    def forward(self, batch: Batch) -> Tensor:
        heads = {task: self._head(i, batch) for i, task in enumerate(TASKS)}
        probe = getattr(self.balancer, "probe", None)
        if probe is None or not probe.takes_layers:
            return self.balancer(self.trunk(batch.inputs), heads, counts=batch.counts())
        # the last layer apart, its activation with the heads
        before, last, after = self.trunk[:2], self.trunk[2], self.trunk[3:]
        heads = {task: (lambda z, head=head: head(after(z))) for task, head in heads.items()}
        return self.balancer(before(batch.inputs), heads, counts=batch.counts(), layer=last)

    def _head(self, i: int, batch: Batch):
        rows = batch.owned[:, i].nonzero().squeeze(1)

        def loss(z: Tensor) -> Tensor | None:
            if not len(rows):
                return None
            out = self.heads[i](z[rows])
            if i == 0:
                return 3 * F.mse_loss(out.squeeze(-1), batch.numbers[rows]) + 0.5
            if i == 1:
                return F.cross_entropy(out, batch.classes[rows])
            return 0.3 * (out - batch.inputs[rows, :5]).square().mean() + 0.03

        return loss


@dataclass(frozen=True)
class Batch:
    inputs: Tensor
    numbers: Tensor
    classes: Tensor
    owned: Tensor  # [B, n] whether the sample has a label of the task
    counted: bool  # False: equal shards, every label, where the default count says the same

    def rows(self, index: Tensor) -> Batch:
        inputs, numbers, classes, owned = (
            x[index] for x in (self.inputs, self.numbers, self.classes, self.owned)
        )
        return Batch(inputs, numbers, classes, owned, self.counted)

    def counts(self) -> dict[str, int] | None:
        if not self.counted:
            return None
        return {task: int(self.owned[:, i].sum()) for i, task in enumerate(TASKS)}


def global_batch(step: int, scenario: str, dtype: torch.dtype = torch.float32) -> Batch:
    """The concatenated batch of one step."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(BATCH, 6, generator=generator, dtype=dtype)
    numbers = 2 + inputs[:, 0] * inputs[:, 1] + torch.randn(BATCH, generator=generator, dtype=dtype)
    classes = torch.randint(0, 4, (BATCH,), generator=generator)
    owned = torch.ones(BATCH, len(TASKS), dtype=torch.bool)
    if scenario == "absent on some ranks":
        owned[:, 1] = torch.arange(BATCH) < 3  # only the first rank of 2 or 4 has any
        owned[::5, 2] = False
    if scenario == "absent on all ranks" and step % 3 == 1:
        owned[:, (step // 3) % len(TASKS)] = False
    if scenario == "nothing on one rank":
        owned[:] = (torch.arange(BATCH) < BATCH // 4)[:, None]  # only the first rank of 4 has any task
    return Batch(inputs, numbers, classes, owned, counted=scenario != "even")


SCENARIOS = ("even", "ragged", "absent on some ranks", "absent on all ranks", "nothing on one rank")


def shard(batch: Batch, rank: int, world_size: int, scenario: str) -> Batch:
    """This rank's rows."""
    sizes = [BATCH // world_size] * world_size
    if scenario == "ragged":
        sizes = {1: [24], 2: [7, 17], 4: [1, 9, 4, 10]}[world_size]
    start = sum(sizes[:rank])
    return batch.rows(torch.arange(start, start + sizes[rank]))

"""Pipeline stages crossed with data parallelism: 2 stages x 2 data ranks, by torch.distributed.pipelining.

    pipeline.py OUT CASES...

The last rank writes `OUT`: for each case what `alone` gives for one process, which joins the micro-batches.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start, stop
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleavedZeroBubble,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.weighting import MGDA, GradNorm, InverseLoss

STEPS = 3
MICRO = 3  # micro-batches of a step
ROWS = 4  # of a micro-batch on one data rank
TASKS = ("a", "b")


@dataclass(frozen=True)
class Way:
    """A schedule with the data parallelism of its stages.

    Attributes:
        make: the schedule of one stage.
        sharded: whether stages are FSDP2's; else DDP's.
        static: whether the shapes of what passes are told; else torch rehearses the first step to learn them.
        eager: whether the last stage runs the backward of a micro-batch before the next forward.
    """

    make: Callable[..., Any]
    sharded: bool
    static: bool
    eager: bool


WAYS = {
    "GPipe": Way(ScheduleGPipe, sharded=False, static=True, eager=False),  # DDP cannot be rehearsed
    "1F1B": Way(Schedule1F1B, sharded=True, static=False, eager=True),
    "zero bubble": Way(
        lambda stage, *args, **others: ScheduleInterleavedZeroBubble([stage], *args, **others),
        sharded=True,
        static=True,
        eager=True,
    ),
}


@dataclass(frozen=True)
class Case:
    """A balancer, and where it is called.

    Attributes:
        make: from the group of its ranks.
        place: "forward" of the last stage, "loss_fn" of the schedule, or "losses": in the forward, on losses.
    """

    make: Callable[[dist.ProcessGroup | None], Balancer]
    place: str = "forward"


CASES = {
    "losses": Case(lambda group: Balancer(TASKS, InverseLoss(), group=group), "losses"),
    "losses, lag": Case(lambda group: Balancer(TASKS, InverseLoss(), group=group, lag=1), "losses"),
    "FeatureProbe": Case(lambda group: Balancer(TASKS, MGDA(), group=group, probe=FeatureProbe())),
    "FeatureProbe in loss_fn": Case(lambda group: Balancer(TASKS, GradNorm(), group=group), "loss_fn"),
    "FeatureProbe, window": Case(lambda group: Balancer(TASKS, MGDA(), group=group, window=MICRO)),
    "FeatureProbe, lag": Case(lambda group: Balancer(TASKS, MGDA(), group=group, lag=1)),
    "FeatureTap": Case(lambda group: Balancer(TASKS, GradNorm(), group=group, probe=FeatureTap())),
    "FeatureTap, lag": Case(lambda group: Balancer(TASKS, MGDA(), group=group, probe=FeatureTap(), lag=1)),
}
ALL = [f"{way}: {case}" for way in WAYS for case in CASES]


class First(nn.Module):
    """The first half of the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


class Last(nn.Module):
    """The second half, the heads and the balancer."""

    def __init__(self, balancer: Balancer, place: str) -> None:
        super().__init__()
        self.layer, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 2)
        self.balancer, self.place = balancer, place

    def forward(self, h: Tensor, y: Tensor | None = None) -> Tensor:
        z = self.layer(h).tanh()
        # one number for each micro-batch: torch joins the outputs of all of them
        return z if y is None else torch.stack([self.total(z, y)])

    def total(self, z: Tensor, y: Tensor) -> Tensor:
        heads = {
            "a": lambda z: F.cross_entropy(self.a(z), (y[:, 0] > 0) + 2 * (y[:, 1] > 0)),
            "b": lambda z: F.mse_loss(self.b(z), y),
        }
        if self.place == "losses":
            return self.balancer({task: head(z) for task, head in heads.items()})
        return self.balancer(z, heads)


def stages(case: Case, group: dist.ProcessGroup | None) -> tuple[First, Last]:
    torch.manual_seed(3)
    return First(), Last(case.make(group), case.place)


def batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """What one data rank reads in one step."""
    x = torch.randn(MICRO * ROWS, 6, generator=torch.Generator().manual_seed(10 * step + rank))
    return x, x[:, :2] * x[:, 2:4] + x[:, 4:]


def joined(step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The micro-batches of a step, each with the rows of both data ranks."""
    read = [[part.chunk(MICRO) for part in batch(step, rank)] for rank in (0, 1)]
    for number in range(MICRO):
        x, y = (torch.cat([of_rank[part][number] for of_rank in read]) for part in (0, 1))
        yield x, y


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.2, momentum=0.5)


def seen(balancer: Balancer) -> tuple[Tensor, Tensor]:
    """Weights and Gram after a step."""
    report = balancer.report
    assert report is not None
    gram = report.stats.gram
    return report.weight_vector.clone(), torch.zeros(()) if gram is None else gram.clone()


def result(
    balancer: Balancer, steps: list[tuple[Tensor, Tensor]], parameters: list[Tensor]
) -> dict[str, Any]:
    weights, grams = (torch.stack(column) for column in zip(*steps, strict=True))
    return {"calls": balancer.step, "weights": weights, "grams": grams, "parameters": parameters}


def alone(name: str) -> dict[str, Any]:
    """One process, in the order of the schedule's forwards and backwards."""
    way, case = WAYS[name.split(": ")[0]], CASES[name.split(": ")[1]]
    first, last = stages(case, None)
    optimizers, steps = (sgd(first), sgd(last)), []
    for step in range(STEPS):
        waiting = []
        for x, y in joined(step):
            h = first(x)
            total = last.total(last(h), y) if case.place == "loss_fn" else last(h, y)
            waiting.append(total.sum() / MICRO)
            if way.eager:
                waiting.pop().backward()
        for total in waiting:
            total.backward()
        steps.append(seen(last.balancer))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return result(last.balancer, steps, [p.detach() for stage in (first, last) for p in stage.parameters()])


def piped(name: str, mesh: DeviceMesh) -> dict[str, Any] | None:
    """The same on this rank's stage; None on the first stage, which calls no balancer."""
    way, case = WAYS[name.split(": ")[0]], CASES[name.split(": ")[1]]
    place, data = mesh["pp"].get_local_rank(), mesh["dp"]
    # the ranks of this stage: on the last one, those that see the losses
    first, last = stages(case, data.get_group())
    module: nn.Module = (first, last)[place]
    if way.sharded:
        fully_shard(module, mesh=data)
    else:
        module = DistributedDataParallel(module, process_group=data.get_group())
    shapes = {} if not way.static else told(case, place)
    stage = PipelineStage(module, place, 2, torch.device("cpu"), group=mesh["pp"].get_group(), **shapes)
    loss_fn = last.total if case.place == "loss_fn" else lambda total, _: total.sum()
    schedule = way.make(stage, n_microbatches=MICRO, loss_fn=loss_fn)
    optimizer, steps = sgd(module), []
    for step in range(STEPS):
        x, y = batch(step, data.get_local_rank())
        if place == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, **({} if case.place == "loss_fn" else {"y": y}))
            steps.append(seen(last.balancer))
        optimizer.step()
        optimizer.zero_grad()
    own = [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in module.parameters()]
    of_stages: list[Any] = [None, None]
    dist.all_gather_object(of_stages, own, group=mesh["pp"].get_group())
    return result(last.balancer, steps, [*of_stages[0], *of_stages[1]]) if place else None


def told(case: Case, place: int) -> dict[str, Tensor]:
    """Shapes of what a stage takes and gives."""
    passed = torch.zeros(ROWS, 8, requires_grad=True)
    if place == 0:
        return {"input_args": torch.zeros(ROWS, 6), "output_args": passed}
    given = passed if case.place == "loss_fn" else torch.zeros(1, requires_grad=True)
    return {"input_args": passed, "output_args": given}


def main() -> None:
    rank, world_size = start()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    assert (world_size, mesh.size(), mesh["pp"].size(), mesh["dp"].size()) == (4, 4, 2, 2)
    results = {name: piped(name, mesh) for name in sys.argv[2:]}
    if rank == world_size - 1:
        torch.save(results, sys.argv[1])
    stop()


if __name__ == "__main__":
    main()

"""Layouts of process groups on 4 ranks, beside the pipeline and the context: each equals one process.

    device_meshes.py OUT FOLDER

Rank 0 writes `OUT`: by layout, what each rank got (None: it has no balancer). `FOLDER` is for stores.
"""

from __future__ import annotations

import datetime
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.nn.functional import all_reduce
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mtl_dist import Balancer, FeatureProbe, ParameterProbe, SharedLayerProbe
from mtl_dist.sync.group import timeout_of
from mtl_dist.weighting import MGDA, Equal, GradNorm

STEPS = 4
ROWS = 6  # of a data rank
TASKS = ("a", "b")
TIMEOUT = datetime.timedelta(seconds=77)


@dataclass
class Place:
    """Where this process is among the ranks that hold different samples.

    Attributes:
        data: the data ranks whose rows this process reads.
        group: over which gradients are averaged, and statistics summed; None: all ranks of the job.
    """

    data: tuple[int, ...]
    group: dist.ProcessGroup | None = None


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self, balancer: Balancer, features: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8))
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 2)
        self.balancer, self.features = balancer, features or (lambda z: z)

    def forward(self, x: Tensor, *, layer: bool = False) -> Tensor:
        classes = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
        heads = {
            "a": lambda z: F.cross_entropy(self.a(z), classes),
            "b": lambda z: F.mse_loss(self.b(z), x[:, 2:4]),
        }
        if layer:
            return self.balancer(self.trunk[:2](x), heads, layer=self.trunk[2])
        return self.balancer(self.features(self.trunk(x)), heads)


class Experts(nn.Module):
    """Two experts and a router. With a group, this rank has one of them, and rows travel."""

    def __init__(self, mesh: DeviceMesh | None) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)
        both = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.group = None if mesh is None else mesh.get_group()
        self.place = None if mesh is None else mesh.get_local_rank()
        self.experts = nn.ModuleList(both if mesh is None else [both[self.place]])

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(1)
        if self.place is None:
            return x + sum(gates[:, [e]] * expert(x).tanh() for e, expert in enumerate(self.experts))
        own = slice(self.place * len(x), (self.place + 1) * len(x))
        x_of_all, gates_of_all = (self.of_all(part) for part in (x, gates))
        y = gates_of_all[:, [self.place]] * self.experts[0](x_of_all).tanh()
        return x + all_reduce(y, group=self.group)[own]

    def of_all(self, part: Tensor) -> Tensor:
        """The rows of both ranks; its backward sums what each of them asks for."""
        beside = (0, 0, self.place * len(part), (1 - self.place) * len(part))
        return all_reduce(F.pad(part, beside), group=self.group)


def batch(step: int, place: Place) -> Tensor:
    seeds = (torch.Generator().manual_seed(10 * step + data) for data in place.data)
    return torch.cat([torch.randn(ROWS, 6, generator=seed) for seed in seeds])


def average(net: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Gradients as an engine averages them over the data ranks."""
    for parameter in net.parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        dist.all_reduce(gradient, group=group)
        gradient /= dist.get_world_size(group)


def train(
    net: Net, place: Place, steps: range = range(STEPS), reduce: Callable[[nn.Module], None] | None = None
) -> dict[str, Any]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    weights, grams = [], []
    for step in steps:
        net(batch(step, place)).backward()
        if dist.is_initialized():
            partial(average, group=place.group)(net) if reduce is None else reduce(net)
        weights.append(net.balancer.report.weight_vector.clone())
        grams.append(net.balancer.report.stats.gram.clone())
        optimizer.step()
        optimizer.zero_grad()
    parameters = [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for p in net.parameters()
    ]
    return {"weights": torch.stack(weights), "grams": torch.stack(grams), "parameters": parameters}


def joined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two parts of one training."""
    both = {key: torch.cat([first[key], second[key]]) for key in ("weights", "grams")}
    return {**both, "parameters": second["parameters"]}


def balancer(group: dist.ProcessGroup | None = None, rule: Any = None) -> Balancer:
    return Balancer(TASKS, rule or MGDA(), probe=FeatureProbe(), group=group)


def uneven(rank: int, _: Path) -> dict[str, Any] | None:
    """Ranks are members of different numbers of groups, and one trains nothing."""
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    data = dist.new_group([0, 1, 2])
    return train(Net(balancer(data)), Place((rank,), data)) if rank < 3 else None


def nested(rank: int, _: Path) -> dict[str, Any]:
    """A group inside a group, each with its training."""
    odd = rank % 2
    outer = dist.new_group([odd, odd + 2], use_local_synchronization=True)
    pair = DeviceMesh.from_group(outer, "cpu", mesh_dim_names=("pair",))
    ranks = dist.get_process_group_ranks(pair.get_group())
    inner = dist.new_group(ranks, use_local_synchronization=True, timeout=TIMEOUT)
    net = Net(balancer(inner))
    result = train(net, Place((dist.get_rank(inner),), inner))
    assert timeout_of(net.balancer._synchronizer._collectives._live_group()) == TIMEOUT
    return result


def permuted(rank: int, _: Path) -> dict[str, Any]:
    """A mesh whose ranks are in another order, where both columns hold the same samples."""
    mesh = DeviceMesh("cpu", torch.tensor([[3, 0], [2, 1]]), mesh_dim_names=("dp", "tp"))
    assert (mesh.size(), mesh["dp"].size(), mesh["tp"].size()) == (4, 2, 2)
    data = mesh["dp"]
    assert dist.get_process_group_ranks(data.get_group()) == ([2, 3] if rank > 1 else [0, 1])
    return train(Net(balancer(data.get_group())), Place((data.get_local_rank(),), data.get_group()))


def late(rank: int, _: Path) -> dict[str, Any]:
    """The group comes after the balancer was used in eval mode, and before its first step."""
    net = Net(balancer())
    net.eval()(batch(0, Place((0,))))
    data = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "dp"))["dp"]
    net.train().balancer.set_group(data.get_group())
    return train(net, Place((data.get_local_rank(),), data.get_group()))


def experts(rank: int, _: Path) -> dict[str, Any]:
    """All ranks hold different samples; each has one of the two experts."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    assert (mesh.size(), mesh["dp"].size(), mesh["ep"].size()) == (4, 2, 2)
    net = Net(balancer())
    net.trunk = with_experts(mesh["ep"])
    own = {id(p) for p in net.trunk[2].experts.parameters()}

    def reduce(net: nn.Module) -> None:
        for parameter in net.parameters():
            # the backward has summed over the ranks that sent rows to this expert
            of_expert = id(parameter) in own
            dist.all_reduce(parameter.grad, group=mesh["dp"].get_group() if of_expert else None)
            parameter.grad /= 4

    result = train(net, Place((rank,)), reduce=reduce)
    of_experts: list[Any] = [None, None]
    mine = [p.detach() for p in net.trunk[2].experts.parameters()]
    dist.all_gather_object(of_experts, mine, group=mesh["ep"].get_group())
    others = [p.detach() for p in net.parameters() if id(p) not in own]
    return {**result, "parameters": [*others, *of_experts[0], *of_experts[1]]}


def with_experts(mesh: DeviceMesh | None) -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), Experts(mesh))


def tensor(rank: int, _: Path) -> dict[str, Any]:
    """Trunk and heads split over `tp`, and features gathered from rows; what is split is refused."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert (mesh.size(), mesh["dp"].size(), mesh["tp"].size()) == (4, 2, 2)
    plan = {
        "trunk.0": ColwiseParallel(),
        "trunk.2": RowwiseParallel(output_layouts=Shard(0), use_local_output=False),
        "a": ColwiseParallel(output_layouts=Replicate()),
        "b": ColwiseParallel(output_layouts=Replicate()),
    }
    data = mesh["dp"]
    place = Place((data.get_local_rank(),), data.get_group())
    net = Net(balancer(data.get_group()), lambda z: z.full_tensor())
    parallelize_module(net, mesh["tp"], plan)
    split = DTensor.from_local(torch.ones(3, 1, requires_grad=True), mesh["tp"], [Shard(0)])
    other = Balancer(TASKS, Equal(), group=data.get_group())
    refused = [
        words(lambda: net.balancer(split, {"a": lambda z: z.mean()})),
        words(lambda: other({"a": split.mean()})),
        words(lambda: other(split[:, 0], task_ids=torch.zeros(6, dtype=torch.int64))),
    ]
    net.balancer = Balancer(TASKS, MGDA(), probe=ParameterProbe(), group=data.get_group())
    refused.append(words(lambda: net(batch(0, place))))
    net.balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe(), group=data.get_group())
    refused.append(words(lambda: net(batch(0, place), layer=True)))
    net.balancer = balancer(data.get_group())
    return {**train(net, place), "refused": refused}


def words(call: Callable[[], Any]) -> str:
    try:
        return str(call())
    except ValueError as error:
        return str(error)


def anew(rank: int, folder: Path) -> dict[str, Any]:
    """The job ends and begins again, twice, with other ranks beside each other; the balancer goes on."""
    net = Net(balancer(rule=GradNorm(lr=0.2)))
    parts = []
    for number, names in enumerate((("tp", "dp"), ("dp", "tp"), ("tp", "dp"))):
        if number:
            gc.collect()
            dist.destroy_process_group()
            again(folder / f"store{number}", rank)
        data = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)["dp"]
        net.balancer.set_group(data.get_group())
        place = Place((data.get_local_rank(),), data.get_group())
        parts.append(train(net, place, range(number, number + 1)))
    return joined(joined(parts[0], parts[1]), parts[2])


def again(store: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=TIMEOUT)


LAYOUTS: dict[str, tuple[Callable[[int, Path], Any], int]] = {
    "a group inside a group": (nested, 2),
    "uneven memberships": (uneven, 3),
    "a mesh in another order": (permuted, 2),
    "a group given late": (late, 2),
    "experts": (experts, 4),
    "tensor parallel": (tensor, 2),
    "a job made anew": (anew, 2),  # the last one: it ends the job
}


def alone(name: str) -> dict[str, Any]:
    """One process, which joins the rows of all data ranks."""
    place = Place(tuple(range(LAYOUTS[name][1])))
    if name == "a job made anew":
        return train(Net(balancer(rule=GradNorm(lr=0.2))), place, range(3))
    net = Net(balancer())
    if name == "experts":
        net.trunk = with_experts(None)
        result = train(net, place)
        own = {id(p) for p in net.trunk[2].experts.parameters()}
        last = [p.detach() for p in net.trunk[2].experts.parameters()]
        return {**result, "parameters": [p.detach() for p in net.parameters() if id(p) not in own] + last}
    return train(net, place)


def main() -> None:
    rank, world_size = start()
    assert world_size == 4
    folder = Path(sys.argv[2])
    results: dict[str, Any] = {}
    for name, (layout, _) in LAYOUTS.items():
        of_ranks: list[Any] | None = [None] * 4 if rank == 0 else None
        dist.gather_object(layout(rank, folder), of_ranks)
        results[name] = of_ranks
    if rank == 0:
        torch.save(results, sys.argv[1])
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

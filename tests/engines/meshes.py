"""Device meshes on 4 ranks: HSDP, and data parallelism crossed with tensor parallelism.

    meshes.py OUT

Rank 0 writes `OUT`: a mapping from case to the weights, Grams and parameters of `STEPS` steps. On one process
it writes the reference of every case.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from adapters import full
from ranks import start, stop
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.weighting import MGDA

STEPS = 10
BATCH = 16
TASKS = ("a", "b")
PROBES = {"FeatureProbe": FeatureProbe(), "FeatureTap": FeatureTap()}


class Net(nn.Module):
    """A trunk and two heads that tensor parallelism can split."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8))
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        classes = (x[:, 0] > 0) + 2 * (x[:, 1] > 0)
        heads = {
            "a": lambda z: F.cross_entropy(self.a(z), classes),
            "b": lambda z: F.mse_loss(self.b(z), x[:, 2:4]),
        }
        return self.balancer(self.trunk(x), heads)


def batch(step: int) -> Tensor:
    return torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))


def train(
    probe: str, group: dist.ProcessGroup | None, wrap: Callable[[Net], Any], rank: int, world_size: int
) -> dict[str, Any]:
    """Trajectory of data-parallel rank `rank` of `world_size`."""
    torch.manual_seed(3)
    balancer = Balancer(TASKS, MGDA(), probe=PROBES[probe], group=group)
    net = Net(balancer)
    wrap(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    weights, grams = [], []
    size = BATCH // world_size
    for step in range(STEPS):
        net(batch(step)[rank * size : (rank + 1) * size]).backward()
        assert balancer.report is not None
        weights.append(balancer.report.weight_vector)
        grams.append(balancer.report.stats.gram)
        optimizer.step()
        optimizer.zero_grad()
    parameters = full(net)
    gc.collect()
    return {"weights": torch.stack(weights), "gram": torch.stack(grams), "parameters": parameters}


def hsdp(mesh: DeviceMesh) -> Callable[[Net], Any]:
    def wrap(net: Net) -> None:
        for unit in (net.trunk, net.a, net.b, net):
            fully_shard(unit, mesh=mesh)

    return wrap


def tensor_parallel(mesh: DeviceMesh) -> Callable[[Net], Any]:
    """Trunk and one head split over `tp`, everything sharded over `dp`."""
    plan = {
        "trunk.0": ColwiseParallel(),
        "trunk.2": RowwiseParallel(),
        "a": ColwiseParallel(output_layouts=Replicate()),
    }

    def wrap(net: Net) -> None:
        parallelize_module(net, mesh["tp"], plan)
        for unit in (net.trunk, net.a, net.b, net):
            fully_shard(unit, mesh=mesh["dp"])

    return wrap


def main() -> None:
    rank, world_size = start()
    results: dict[str, Any] = {}
    for probe in PROBES:
        if world_size == 1:
            results[probe] = train(probe, None, lambda net: None, 0, 1)
            continue
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
        results[f"HSDP, {probe}"] = train(probe, None, hsdp(mesh), rank, 4)
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        dp = mesh["dp"].get_local_rank()
        assert (mesh.size(), mesh["dp"].size(), mesh["tp"].size()) == (4, 2, 2)
        wrap = tensor_parallel(mesh)
        results[f"dp x tp, {probe}"] = train(probe, mesh["dp"].get_group(), wrap, dp, 2)
        results[f"dp x tp without its group, {probe}"] = train(probe, None, wrap, dp, 2)
    if rank == 0:
        torch.save(results, sys.argv[1])
    stop()


if __name__ == "__main__":
    main()

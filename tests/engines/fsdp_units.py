"""What FeatureProbe makes FSDP2 gather, on 2 ranks: `fsdp_units.py OUT`; rank r writes the JSON `OUT.r`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp._fully_shard._fsdp_param_group as param_group
from ranks import start, stop
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mtl_dist.engines.fsdp2 as insides
from mtl_dist import Balancer, FeatureProbe
from mtl_dist.weighting import MGDA

TASKS = ("a", "b", "c")


class Net(nn.Module):
    """A trunk of two units and three heads, each a unit of `width` x 4 weights and more."""

    def __init__(self, balancer: Balancer | None, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 4))
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(4, width), nn.Linear(width, 1)) for _ in TASKS)
        self.balancer = balancer

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x)
        heads = {t: (lambda z, h=h, i=i: (h(z) - i).square().mean()) for i, (t, h) in enumerate(self.tasks())}
        if self.balancer is None:
            return sum((head(z) for head in heads.values()), torch.zeros(()))
        return self.balancer(z, heads)

    def tasks(self) -> list[tuple[str, nn.Module]]:
        return list(zip(TASKS, self.heads, strict=True))


def sharded(net: Net, *, reshard: bool) -> Net:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for unit in (net.trunk[0], net.trunk[2], *net.heads, net):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    return net


def make(*, balanced: bool, reshard: bool, width: int) -> Net:
    torch.manual_seed(0)
    balancer = Balancer(TASKS, MGDA(), probe=FeatureProbe()) if balanced else None
    return sharded(Net(balancer, width), reshard=reshard)


def gathered(net: Net) -> list[list[int]]:
    """For two steps, the number of parameters in each group that is gathered."""
    steps: list[list[int]] = []
    original = param_group.foreach_all_gather

    def counted(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        steps[-1].append(sum(p.sharded_param.numel() for p in parameters))
        return original(parameters, *args, **kwargs)

    param_group.foreach_all_gather = counted
    for _ in range(2):
        steps.append([])
        net(torch.randn(6, 5)).backward()
    param_group.foreach_all_gather = original
    return steps


def freed(net: Net) -> bool:
    """Whether every unit is sharded between two steps."""
    return all(isinstance(parameter, DTensor) for parameter in net.parameters())


def after_a_dropped_batch() -> list[float]:
    """Sums of losses of the balanced and the plain model, with an optimizer step after a lone forward."""
    return [
        _after_a_dropped_batch(make(balanced=balanced, reshard=True, width=2)) for balanced in (True, False)
    ]


def _after_a_dropped_batch(net: Net) -> float:
    x, optimized = torch.ones(6, 5), list(net.parameters())
    net(x)  # no backward
    with torch.no_grad():
        for parameter in optimized:
            parameter.mul_(1.5)
    total = net(x)
    total.backward()
    return total.item() if net.balancer is None else sum(net.balancer.report.losses.values())


def trained(*, reshard: bool, missing: str, alone: dist.ProcessGroup) -> dict[str, Any]:
    """Largest errors of weights and parameters after some steps, against this process on the whole batch.

    Args:
        reshard: of the units.
        missing: what FSDP2 has under another name; "": nothing.
        alone: the group of this rank, in which the reference trains.
    """
    with simulated(missing):
        sharded_net = make(balanced=True, reshard=reshard, width=2)
        torch.manual_seed(0)
        whole = Net(Balancer(TASKS, MGDA(), probe=FeatureProbe(), group=alone), 2)
        weights = [_steps(net, shard) for net, shard in ((whole, False), (sharded_net, True))]
    pairs = zip(whole.parameters(), sharded_net.parameters(), strict=True)
    return {
        "weights": float((weights[0] - weights[1]).abs().max()),
        "parameters": max(float((a - b.full_tensor()).abs().max() / a.abs().max()) for a, b in pairs),
        "found": sharded_net.balancer._engine.units is not None,
    }


def _steps(net: Net, shard: bool) -> Tensor:
    """The weights of four steps of training."""
    optimizer, seen = torch.optim.SGD(net.parameters(), lr=0.05), []
    for number in range(4):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
        net(x.chunk(2)[dist.get_rank()] if shard else x).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(net.balancer.report.weight_vector)
    return torch.stack(seen)


@contextmanager
def simulated(missing: str) -> Iterator[None]:
    """FSDP2 as if one of the insides that we read had another name; FSDP2 itself goes on with its own."""

    def absent(*_: Any) -> Any:
        raise AttributeError(f"no attribute {missing!r}")

    if not missing:
        yield
        return
    original = getattr(insides, missing)
    setattr(insides, missing, absent)
    try:
        yield
    finally:
        setattr(insides, missing, original)


def main() -> None:
    rank, world_size = start()
    alone = [dist.new_group([member]) for member in range(world_size)][rank]
    result = {
        f"reshard={reshard} width={width}": {
            "plain": gathered(make(balanced=False, reshard=reshard, width=width)),
            "balanced": gathered(net := make(balanced=True, reshard=reshard, width=width)),
            "freed": freed(net),
        }
        for reshard in (False, True)
        for width in (2, 40)
    }
    result["dropped"] = after_a_dropped_batch()
    result["trained"] = {
        f"reshard={reshard} missing={missing}": trained(reshard=reshard, missing=missing, alone=alone)
        for reshard in (False, True)
        for missing in ("", "_groups", "_groups_of", "_size")
    }
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(result))
    stop()


if __name__ == "__main__":
    main()

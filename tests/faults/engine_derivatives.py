"""Losses that hold derivatives with respect to the input, under engines that shard.

    engine_derivatives.py OUT

Each rank writes `OUT.RANK`: JSON, from engine to the relative error of the Gram, or to what it raised.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import start, stop
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from two_ranks import DATA, Pinn, mine

from mtl_dist import ParameterProbe


def expected() -> Tensor:
    net = Pinn()
    x = DATA.clone().requires_grad_()
    shared = list(net.trunk.parameters())
    rows = []
    for loss in net.losses(net.trunk(x), x).values():
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, shared, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows) @ torch.stack(rows).T


def zero(stage: int, x: Tensor) -> Tensor:
    import deepspeed

    net = Pinn(ParameterProbe(bucket=30)).float()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(x.float()))
    engine.step()
    return net.balancer.report.stats.gram


def sharded(x: Tensor) -> Tensor:
    net = Pinn(ParameterProbe())
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (net.trunk[0], net.trunk[2], net.head, net):
        fully_shard(module, mesh=mesh)
    net(x).backward()
    return net.balancer.report.stats.gram


def main() -> None:
    rank, _ = start()
    x, truth = mine(rank), expected()
    results: dict[str, Any] = {}
    cases = {f"zero-{stage}": (lambda stage=stage: zero(stage, x)) for stage in range(4)}
    for name, run in {**cases, "fsdp2": lambda: sharded(x)}.items():
        try:
            results[name] = float((run() - truth).abs().max() / truth.abs().max())
        except Exception as error:
            results[name] = [type(error).__name__, str(error)]
        gc.collect()
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main()

"""The engines of overhead.py: how they take one training step, with assertions about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer

Step = Callable[[Tensor, Tensor], None]
ENGINES = ("plain", "ddp", "fsdp2", "fsdp2-reshard", "zero2")
LEARNING_RATE = 1e-8  # the model stays what it is: weights of 1 / norm diverge at 1e-3


def start(engine: str, num_ranks: int, device: torch.device) -> None:
    """Joins the job that `engine` needs."""
    if engine == "plain":
        assert num_ranks == 1, "plain torch runs on one rank; take ddp"
        return
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    assert dist.get_world_size() == num_ranks


def engine_step(engine: str, net: nn.Module, balancer: Balancer | None) -> Step:
    """One training step of `net` under `engine`, including the optimizer."""
    if engine == "zero2":
        return _zero_step(net, balancer)
    model: nn.Module = net
    if engine.startswith("fsdp2"):
        model = _sharded(net, keep_heads=engine == "fsdp2")
    elif engine == "ddp":
        model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        model(x, labels).backward()
        optimizer.step()

    return step


def _sharded(net: Any, *, keep_heads: bool) -> nn.Module:
    """FSDP2 with three kinds of units: the trunk, each head, and the rest.

    The backward needs the heads first. Their parameters may stay gathered between forward and backward, as is
    usual for last layers. If they are resharded, they are gathered again for the gradients of the tasks.
    """
    mesh = init_device_mesh(next(net.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(net.trunk, mesh=mesh)
    for head in net.heads:
        fully_shard(head, mesh=mesh, reshard_after_forward=not keep_heads)
    fully_shard(net, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    return net


def _zero_step(net: nn.Module, balancer: Balancer | None) -> Step:
    import deepspeed

    from mtl_dist.integrations.deepspeed import attach

    config = {
        "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's bookkeeping reads it
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)
    assert engine.zero_optimization_stage() == 2
    if balancer is not None:
        attach(balancer, engine)

    def step(x: Tensor, labels: Tensor) -> None:
        engine.backward(engine(x, labels))
        engine.step()

    return step

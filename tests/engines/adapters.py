"""Engines behind one interface: build, one optimizer step, parameters in full, what really runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from cells import Cell
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy import DEVICE, Batch, Net

from mtl_dist import Balancer
from mtl_dist import Engine as Facts

LEARNING_RATE = 0.02
LOSS_SCALE = 2.0**8  # of float16: small, so that no step overflows
BACKEND = "aot_eager"  # all of compilation but the code, which takes seconds


@dataclass
class Engine:
    """One training of one cell.

    Attributes:
        model: what is called.
        step: one optimizer step over its micro-batches; calls the observer after each backward.
        parameters: full float32 parameters by name; a collective.
        facts: what really runs, asserted by the engine's builder too.
    """

    model: nn.Module
    step: Callable[[Sequence[Batch], Callable[[], None]], None]
    parameters: Callable[[], dict[str, Tensor]]
    facts: dict[str, Any]


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """Plain SGD with momentum: unlike Adam it does not hide a factor in the gradients."""
    return torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=0.9)


def compile_parts(net: Net, cell: Cell) -> None:
    """Compiles in place, before the engine wraps the model."""
    what, _, backend = cell.compiled.partition(", ")
    if what == "trunk":
        net.trunk.compile(backend=backend or BACKEND)
    elif what == "model":
        net.compile(backend=backend or BACKEND)


def full(net: nn.Module) -> dict[str, Tensor]:
    """Copies of plain or sharded parameters."""
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().float().clone()
        for name, p in net.named_parameters()
    }


def native(
    model: nn.Module, net: Net, cell: Cell, boundary: Callable[[bool], AbstractContextManager], **facts: Any
) -> Engine:
    """An ordinary loop of torch; `boundary(last)` surrounds a micro-batch."""
    optimizer = sgd(net)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(cell.precision)
    autocast = half is not None and not isinstance(model, FSDPModule)
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=LOSS_SCALE, enabled=half is torch.float16)
    if scaler.is_enabled() and net.balancer is not None:
        net.balancer.set_engine(Facts(scaled=scaler.scale))

    def step(batches: Sequence[Batch], observe: Callable[[], None]) -> None:
        for i, batch in enumerate(batches):
            with boundary(i == len(batches) - 1):
                with torch.autocast(DEVICE.type, half, enabled=autocast):
                    loss = model(batch)
                scaler.scale(loss / len(batches)).backward()
                observe()
        scaler.step(optimizer)
        scaler.update()
        assert not scaler.is_enabled() or scaler.get_scale() == LOSS_SCALE, "a step overflowed"
        optimizer.zero_grad()

    return Engine(model, step, partial(full, net), {"class": type(model).__name__, **facts})


def plain(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    compile_parts(net, cell)
    return native(net, net, cell, lambda last: nullcontext())


def ddp(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    compile_parts(net, cell)
    option = cell.engine.removeprefix("ddp").strip()
    model = DistributedDataParallel(net, **({option: True} if option else {}))
    assert not option or getattr(model, option)
    return native(model, net, cell, lambda last: nullcontext() if last else model.no_sync())


def fsdp2(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    """Trunk, each head, and root as units of their own."""
    reshard = "reshard_after_forward=False" not in cell.engine
    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {
        "mesh": init_device_mesh(DEVICE.type, (dist.get_world_size(),)),
        "reshard_after_forward": reshard,
        **({"mp_policy": mixed} if cell.precision == "bf16" else {}),
    }
    compile_parts(net, cell)
    for unit in (net.trunk, *net.heads, net):
        fully_shard(unit, **options)

    def boundary(last: bool) -> AbstractContextManager:
        net.set_requires_gradient_sync(last)
        return nullcontext()

    assert all(isinstance(p, DTensor) for p in net.parameters())
    return native(net, net, cell, boundary, dtensors=True)


def deepspeed_config(cell: Cell, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # only its product with the others is checked
        "gradient_accumulation_steps": cell.accumulation,
        "gradient_clipping": 1e6,  # Accelerate turns 0 into 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": cell.precision == "bf16"},
        "fp16": {"enabled": cell.precision == "fp16", "loss_scale": LOSS_SCALE},
        "steps_per_print": None,
    }


def deepspeed_facts(engine: Any, stage: int) -> dict[str, Any]:
    """Asserts that the stage runs that was asked for."""
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert isinstance(engine, deepspeed.DeepSpeedEngine)
    assert engine.zero_optimization_stage() == stage
    expected = {1: DeepSpeedZeroOptimizer, 2: DeepSpeedZeroOptimizer, 3: DeepSpeedZeroOptimizer_Stage3}
    assert stage == 0 or isinstance(engine.optimizer, expected[stage])
    assert engine.dp_world_size == dist.get_world_size()
    partitioned = [hasattr(p, "ds_id") for p in engine.module.parameters()]
    assert all(partitioned) if stage == 3 else not any(partitioned)
    return {"class": type(engine).__name__, "stage": engine.zero_optimization_stage()}


def deepspeed_parameters(engine: Any) -> dict[str, Tensor]:
    """The float32 master parameters, where the engine keeps them apart."""
    from deepspeed.utils import safe_get_full_fp32_param

    if engine.zero_optimization_stage() == 0:
        return full(engine.module)
    return {
        name: safe_get_full_fp32_param(p).detach().float().clone()
        for name, p in engine.module.named_parameters()
    }


def zero(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    """`deepspeed.initialize`."""
    import deepspeed

    from mtl_dist.integrations.deepspeed import attach

    stage = int(cell.engine[-1])
    compile_parts(net, cell)
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=sgd(net), config=deepspeed_config(cell, stage), dist_init_required=False
    )
    if balancer is not None:
        attach(balancer, engine)

    def step(batches: Sequence[Batch], observe: Callable[[], None]) -> None:
        for batch in batches:
            engine.backward(engine(batch))
            observe()
            engine.step()
        assert engine.was_step_applied()

    return Engine(engine, step, partial(deepspeed_parameters, engine), deepspeed_facts(engine, stage))


def accelerate(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    """Every engine that Accelerate prepares."""
    from accelerate_engines import make_accelerator, unwrapped_facts

    from mtl_dist.integrations.accelerate import attach

    accelerator = make_accelerator(cell)
    if balancer is not None:
        attach(balancer, accelerator)
    compile_parts(net, cell)
    model, optimizer = accelerator.prepare(net, sgd(net))

    def step(batches: Sequence[Batch], observe: Callable[[], None]) -> None:
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(batch))
                observe()
                optimizer.step()
                optimizer.zero_grad()

    facts, parameters = unwrapped_facts(accelerator, model, cell)
    return Engine(model, step, parameters, facts)


def build(net: Net, balancer: Balancer | None, cell: Cell) -> Engine:
    """The engine of `cell` around `net`."""
    builders = {"plain": plain, "ddp": ddp, "fsdp2": fsdp2, "deepspeed": zero}
    return builders.get(cell.family, accelerate)(net, balancer, cell)

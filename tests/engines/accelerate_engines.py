"""Accelerators for the cells that go through Accelerate, one after the other in one process."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    GradScalerKwargs,
    InitProcessGroupKwargs,
)
from adapters import LOSS_SCALE, deepspeed_config, deepspeed_facts, deepspeed_parameters, full
from cells import Cell
from ranks import BACKENDS
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from toy import DEVICE

ON_CPU = DEVICE.type == "cpu"
KINDS = {
    "ddp": DistributedType.MULTI_CPU if ON_CPU else DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
}


def make_accelerator(cell: Cell) -> Accelerator:
    """A fresh accelerator of the kind asked for; its kind and world size are asserted."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for engine in ("FSDP", "DEEPSPEED"):  # a plugin of an earlier cell leaves it for the whole process
        os.environ.pop(f"ACCELERATE_USE_{engine}", None)
    engine = cell.engine.removeprefix("accelerate ")
    options: dict[str, Any] = {
        "mixed_precision": cell.precision.replace("fp32", "no"),
        "gradient_accumulation_plugin": GradientAccumulationPlugin(
            num_steps=cell.accumulation, sync_with_dataloader=False
        ),
    }
    if engine.startswith("zero"):
        config = deepspeed_config(cell, int(engine[-1]))
        backend = InitProcessGroupKwargs(backend=BACKENDS[DEVICE.type])
        options |= {"deepspeed_plugin": DeepSpeedPlugin(hf_ds_config=config), "kwargs_handlers": [backend]}
    elif engine == "fsdp2":
        if ON_CPU:
            _let_fsdp_run_on_the_cpu()
        options |= {"fsdp_plugin": _fsdp_plugin()}
    else:
        options |= {"cpu": ON_CPU}
    if cell.precision == "fp16" and not engine.startswith("zero"):
        options["kwargs_handlers"] = [GradScalerKwargs(init_scale=LOSS_SCALE)]
    accelerator = Accelerator(**options)
    assert accelerator.num_processes == dist.get_world_size()
    assert accelerator.distributed_type == KINDS.get(engine, DistributedType.DEEPSPEED), (
        accelerator.distributed_type
    )
    return accelerator


def _fsdp_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Trunk", "Linear"],
        cpu_ram_efficient_loading=False,
    )


def _let_fsdp_run_on_the_cpu() -> None:
    """Accelerate enables FSDP for accelerators only: test-only, as reference/engines.md 7.4 says."""
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    PartialState._shared_state["_cpu"] = False


def unwrapped_facts(
    accelerator: Accelerator, model: nn.Module, cell: Cell
) -> tuple[dict[str, Any], Callable[[], dict[str, Tensor]]]:
    """What runs, asserted; and how to read its parameters."""
    engine = cell.engine.removeprefix("accelerate ")
    kind = accelerator.distributed_type.value
    if engine.startswith("zero"):
        return {"type": kind, **deepspeed_facts(model, int(engine[-1]))}, partial(deepspeed_parameters, model)
    if engine == "fsdp2":
        assert isinstance(model, FSDPModule)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        return {"type": kind, "class": "FSDPModule"}, partial(full, model)
    if accelerator.num_processes == 1:  # Accelerate makes no DDP of a single process
        assert model is accelerator.unwrap_model(model)
        return {"type": kind, "class": type(model).__name__}, partial(full, model)
    assert isinstance(model, DistributedDataParallel)
    return {"type": kind, "class": "DistributedDataParallel"}, partial(full, model.module)

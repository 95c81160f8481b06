"""What the engine made of the model, and what it asks of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn


def describe_engine(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """The engine as it really runs, for `summary.json`.

    Args:
        accelerator: of the run.
        model: as prepared by it.
    """
    plugin = accelerator.state.deepspeed_plugin
    return {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "mixed_precision": accelerator.mixed_precision,
        "model": type(model).__name__,  # as wrapped: an engine that was left out is seen here
    }


def take_inputs_as_parameters(model: nn.Module) -> None:
    """Makes `model` cast floating-point inputs to the type of its parameters.

    DeepSpeed casts the model for bf16 and fp16 and leaves the inputs alone; autocast and FSDP2 do both.
    """
    model.register_forward_pre_hook(_cast, with_kwargs=True)


def _cast(
    model: nn.Module, inputs: tuple[Any, ...], batch: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    dtype = next(model.parameters()).dtype
    cast = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in batch.items()
    }
    return inputs, cast

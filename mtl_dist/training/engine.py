"""Describes the engine that runs, and casts the inputs of the model as the engine needs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn


def describe_engine(accelerator: Accelerator, model: nn.Module) -> dict[str, Any]:
    """The engine that really runs, for `summary.json`.

    Args:
        accelerator: accelerator of the run.
        model: the prepared model.
    """
    plugin = accelerator.state.deepspeed_plugin
    return {
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "zero_stage": None if plugin is None else plugin.zero_stage,
        "mixed_precision": accelerator.mixed_precision,
        "model": type(model).__name__,  # the wrapper: it shows if the engine is missing
    }


def engine_name(accelerator: Accelerator) -> str:
    """What decides the form of a checkpoint: "ddp" (also one process), "fsdp", or "zero0" to "zero3"."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        return f"zero{plugin.zero_stage}"
    return "fsdp" if accelerator.distributed_type == DistributedType.FSDP else "ddp"


def take_inputs_as_parameters(model: nn.Module) -> None:
    """Makes `model` cast floating-point inputs to the dtype of its parameters.

    For bf16 and fp16, DeepSpeed casts the model but not the inputs. Autocast and FSDP2 cast both.
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

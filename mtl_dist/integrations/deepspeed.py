"""DeepSpeed without Accelerate: one call connects a balancer to the engine of `deepspeed.initialize`.

    engine, *_ = deepspeed.initialize(model=net, config=config)
    attach(balancer, engine)

    engine.backward(engine(batch))
    engine.step()

Statistics are true values: DeepSpeed's loss scale and accumulation factor are divided out. If DeepSpeed skips
a step because of an overflow, the rule stays as it was. `save_checkpoint(balancer, engine, folder)` and
`load_checkpoint` add the balancer's files (`mtl_dist.checkpoint`) to the engine's checkpoints.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from mtl_dist import checkpoint
from mtl_dist._engine import Engine
from mtl_dist.balancer import Balancer

_LOGGER = logging.getLogger("mtl_dist")


def attach(balancer: Balancer, engine: Any) -> Balancer:
    """Connects `balancer` to a `DeepSpeedEngine`: process group, ZeRO stage, loss scale, accumulation.

    Call it before the first step.

    Returns:
        The same balancer.

    Raises:
        TypeError: `engine` is not a `DeepSpeedEngine`, or it is a `PipelineEngine`.
        ValueError: a combination that does not work; the message says what to change.
    """
    check_engine(engine)
    balancer.set_engine(engine_of(engine))
    balancer.set_group(data_parallel_group(engine))
    return balancer


def save_checkpoint(
    balancer: Balancer,
    engine: Any,
    folder: str | Path,
    tag: str | None = None,
    *,
    name: str = "balancer",
    **others: Any,
) -> None:
    """`engine.save_checkpoint(folder, tag, **others)` plus the balancer's state. Call it on all ranks.

    The balancer's files are written first, so that `latest` always names a checkpoint that has them.

    Raises:
        ValueError: the name cannot be a file name.
    """
    tag = f"global_step{engine.global_steps}" if tag is None else str(tag)
    packed = checkpoint.pack(balancer)
    rank = engine.local_rank if engine.use_node_local_storage() else engine.global_rank
    if rank == 0:
        checkpoint.write(packed, Path(folder) / tag, name)
    engine.save_checkpoint(str(folder), tag=tag, **others)


def load_checkpoint(
    balancer: Balancer,
    engine: Any,
    folder: str | Path,
    tag: str | None = None,
    *,
    name: str = "balancer",
    **others: Any,
) -> Any:
    """`engine.load_checkpoint(folder, tag, **others)` plus the balancer's state. Call it on all ranks.

    Returns:
        The result of the engine: path and client state.

    Raises:
        FileNotFoundError: there is no such checkpoint, or it does not include the balancer.
        ValueError: the balancer's state is damaged or belongs to another balancer. Nothing is changed then.
    """
    if tag is None:
        latest = Path(folder) / "latest"
        if not latest.is_file():
            raise FileNotFoundError(f"{str(latest)!r} is missing: give the tag, or a folder with checkpoints")
        tag = latest.read_text(encoding="utf-8").strip()
    checkpoint.load(balancer, Path(folder) / tag, name)
    return engine.load_checkpoint(str(folder), tag=tag, **others)


def check_engine(engine: Any) -> None:
    """Raises `TypeError` unless `engine` runs a whole forward and backward on every rank."""
    from deepspeed import DeepSpeedEngine, PipelineEngine

    if isinstance(engine, PipelineEngine):
        raise TypeError(
            "a PipelineEngine runs features and heads on different ranks, and calls the backward itself: "
            "use ZeRO, or call balancer(losses) with a losses-only rule in the last stage's loss function"
        )
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"attach takes the engine that deepspeed.initialize returned first, got {type(engine).__name__}"
        )


def engine_of(engine: Any) -> Engine:
    """What a balancer must know about the engine: ZeRO stage, accumulation, skipped steps, loss scale.

    Raises:
        ValueError: DeepSpeed runs torch_autocast in float16, for which it does not report skipped steps.
    """
    if _has_gradient_scaler(engine):
        raise ValueError(
            "DeepSpeed's torch_autocast in float16 does not report the steps that its gradient scaler skips: "
            'use "dtype": "bfloat16" there, or the "fp16" section instead of "torch_autocast"'
        )
    managed = engine.managed_gradient_accumulation()
    return Engine(
        accumulation=engine.gradient_accumulation_steps(),
        partitioned=engine.zero_optimization_partition_weights(),
        # if the caller manages the accumulation, the engine knows the boundary only at step()
        closes_window=engine.is_gradient_accumulation_boundary if managed else None,
        skipped=_skip_detector(engine),
        scaled=_loss_scaler(engine) if engine.fp16_enabled() else None,
    )


def data_parallel_group(engine: Any) -> dist.ProcessGroup:
    """The ranks that hold different samples, over which the engine averages gradients.

    With tensor parallelism (an `mpu`), ranks that hold the same samples are not counted twice.

    Raises:
        ValueError: sequence parallelism, under which DeepSpeed sums gradients instead of averaging them.
    """
    if engine.sequence_parallel_size > 1:
        raise ValueError(
            f"sequence parallelism (size {engine.sequence_parallel_size}): the engine sums gradients over "
            "those ranks instead of averaging them, so the weighted total would be too large by that "
            "factor; use data or tensor parallelism"
        )
    group: dist.ProcessGroup = engine.seq_data_parallel_group
    return group


def _skip_detector(engine: Any) -> Callable[[], bool]:
    """A function that says whether the last step was skipped, from `overflow` of DeepSpeed's optimizer."""
    told = False

    def skipped() -> bool:
        nonlocal told
        overflow = getattr(engine.optimizer, "overflow", None)
        if overflow is None and engine.fp16_enabled() and not told:
            told = True
            _LOGGER.warning(
                "mtl_dist: DeepSpeed's %s does not report the steps that it skips because of an overflow. "
                "The rule therefore learns from skipped steps too",
                type(engine.optimizer).__name__,
            )
        return bool(overflow)

    return skipped


def _loss_scaler(engine: Any) -> Callable[[Tensor], Tensor]:
    def scaled(value: Tensor) -> Tensor:
        # a number on the host; the optimizer changes it in its step
        return value * float(engine.optimizer.loss_scale)

    return scaled


def _has_gradient_scaler(engine: Any) -> bool:
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    return any(scaler is not None for scaler in scalers)

"""Accelerate: one call connects a balancer to an `Accelerator` and detects launches that fell back silently.

    accelerator = Accelerator()
    balancer = attach(Balancer(tasks, MGDA()), accelerator)

Nothing else is needed for loss scaling and gradient accumulation. Statistics are true values, without the
loss scale. If the scaler skips a step, the rule stays as it was. With accumulation
(`with accelerator.accumulate(model)`), each micro-batch updates the rule and has its own weights. With
`Balancer(..., window=k)`, all k micro-batches of an optimizer step have the same weights.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from mtl_dist.balancer import Balancer
from mtl_dist.engines import Engine, deepspeed_loss_scaler
from mtl_dist.integrations._attached import check_given
from mtl_dist.integrations._checkpoints import attached_to
from mtl_dist.integrations._idle import IdleWatch, call_after
from mtl_dist.integrations._sequences import split_sequences, sums_gradients
from mtl_dist.integrations.compiling import warn_of_stale_locks
from mtl_dist.integrations.network import choose_interface
from mtl_dist.tracking import STEP_KEY

EXPECTED_PROCESSES = "MTL_DIST_NUM_PROCESSES"  # the scripts in launch/ set it; you may set it too


_PATIENCE = 10  # optimizer steps; some loops begin with steps of another model (the discriminator of a GAN)
_WATCHES: WeakKeyDictionary[Accelerator, IdleWatch] = WeakKeyDictionary()


def attach(
    balancer: Balancer,
    accelerator: Accelerator,
    *,
    name: str = "balancer",
    accumulation: int | None = None,
    late: bool = False,
) -> Balancer:
    """Connects `balancer` to `accelerator` (process group, engine, checkpoints) before the first step.

    `accelerator.save_state` and `load_state` then include the balancer's state, in its own files
    (`mtl_dist.checkpoint`). Loading a checkpoint that was saved without it raises an error. The accelerator
    does not keep the balancer alive: where the model is made anew (folds, a smaller batch), attach the new
    balancer under the same name.

    If 10 optimizer steps use `accelerator.backward` and none passes through an attached balancer, it raises
    `RuntimeError`. Rows (`step_row`) that are given to `accelerator.log` without `step` stand at their
    own step.

    Args:
        balancer: the balancer in the model that the accelerator prepares.
        accelerator: the accelerator of this process.
        name: name of the balancer's files in checkpoints. A second balancer needs another name.
        accumulation: micro-batches per optimizer step, if the accelerator does not know it (HF Trainer).
        late: whether the training may begin without the balancer.

    Returns:
        The same balancer.

    Raises:
        RuntimeError: the launch fell back silently (`check_launch`).
        ValueError: a combination that does not work, or another balancer of this name still exists; the
            message says what to change.
    """
    connect(balancer, accelerator, name=name, accumulation=accumulation)
    if not late:
        _watch(accelerator).add(balancer)
    return balancer


def connect(
    balancer: Balancer, accelerator: Accelerator, *, name: str, accumulation: int | None = None
) -> None:
    """What `attach` does, without watching whether the balancer is used: for integrations that watch."""
    check_given(balancer)
    check_launch(accelerator)
    balancer.set_engine(engine_of(accelerator, accumulation))
    balancer.set_group(data_parallel_group(accelerator) if balancer.group is None else balancer.group)
    attached_to(accelerator).add(balancer, name)
    _log_rows_at_their_step(accelerator)


def detach(balancer: Balancer | str, accelerator: Accelerator) -> None:
    """Undoes `attach`: checkpoints no longer hold the balancer, and it no longer knows the accelerator.

    Args:
        balancer: the balancer, or its name.
        accelerator: what it is attached to.

    Raises:
        ValueError: it is not attached.
    """
    found = attached_to(accelerator).remove(balancer)
    if found is not None:
        found.set_engine(Engine())
        if accelerator in _WATCHES:
            _WATCHES[accelerator].remove(found)


def log_row(
    accelerator: Accelerator, row: Mapping[str, Any], log_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Gives a row to the accelerator's trackers at its own step, `row["train/global_step"]`.

    W&B gets the step as a column only (see `define_wandb_metrics`), because its own step cannot go back when
    a run is resumed.
    """
    for tracker in accelerator.trackers:
        step = None if tracker.name == "wandb" else int(row[STEP_KEY])
        tracker.log(dict(row), step=step, **(log_kwargs or {}).get(tracker.name, {}))


def _log_rows_at_their_step(accelerator: Accelerator) -> None:
    """Makes `accelerator.log(row)` use the row's step; without one, TensorBoard shows all points at 0."""
    inner = accelerator.log
    if getattr(inner, "logs_rows", False):
        return

    @wraps(inner)
    def log(values: Any, step: int | None = None, log_kwargs: Any = None) -> None:
        if step is None and isinstance(values, Mapping) and STEP_KEY in values:
            log_row(accelerator, values, log_kwargs)
        else:
            inner(values, step=step, log_kwargs=log_kwargs)

    log.logs_rows = True  # type: ignore[attr-defined]
    accelerator.log = log


def _watch(accelerator: Accelerator) -> IdleWatch:
    if accelerator in _WATCHES:
        return _WATCHES[accelerator]
    watch = _WATCHES[accelerator] = IdleWatch(
        _PATIENCE,
        "Call balancer(features, heads) in the model's forward, and give the scalar that it returns to "
        "accelerator.backward",
    )

    def after_backward() -> None:
        if accelerator.sync_gradients:  # an optimizer step follows
            watch.after_step()

    call_after(accelerator, "backward", after_backward)
    return watch


def start(
    num_processes: int | None = None,
    data: DataLoaderConfiguration | None = None,
    timeout: timedelta | None = None,
    precision: str | None = None,
) -> Accelerator:
    """An Accelerator with the engine and the number of processes that were asked for, also on a CPU.

    Args:
        num_processes: the required number of processes. None: the number that the launcher was asked for.
        data: how batches are divided over the ranks.
        timeout: how long ranks wait for each other. None: torch's default, 10 minutes with NCCL and 30 with
            Gloo.
        precision: "no", "bf16" or "fp16" (mixed precision). None: what the launcher says.

    Raises:
        RuntimeError: the launch fell back silently (`check_launch`).
    """
    has_engine = any(_flag(variable) for variable in _ENGINES)
    has_device = torch.accelerator.is_available() and not _flag("ACCELERATE_USE_CPU")
    # without a backend Accelerate sees only one process; with cpu=True it turns the engine into DDP
    given: dict[str, Any] = {"backend": "gloo"} if has_engine and not has_device else {}
    if timeout is not None:
        # Accelerate drops what equals its own default of 10 minutes, also where torch's is another
        given["timeout"] = timeout + timedelta(microseconds=1)
    handlers = [InitProcessGroupKwargs(**given)] if given else []
    if not has_device:
        choose_interface()
    if _flag("ACCELERATE_USE_DEEPSPEED") and os.environ.get("LOCAL_RANK", "0") == "0":
        warn_of_stale_locks()
    accelerator = Accelerator(
        cpu=not has_device and not has_engine,
        mixed_precision=precision,
        dataloader_config=data,
        kwargs_handlers=handlers,
    )
    expected = {} if num_processes is None else {EXPECTED_PROCESSES: str(num_processes)}
    check_launch(accelerator, {**os.environ, **expected})
    return accelerator


def engine_of(accelerator: Accelerator, accumulation: int | None = None) -> Engine:
    """What a balancer must know about the engine: accumulation, skipped steps, loss scale, partitioning.

    Args:
        accelerator: the accelerator of this process.
        accumulation: micro-batches per optimizer step, if the accelerator does not know it.
    """
    plugin = accelerator.state.deepspeed_plugin
    return Engine(
        partitioned=plugin is not None and plugin.zero_stage == 3,
        accumulation=accumulation or accelerator.gradient_accumulation_steps,
        closes_window=lambda: accelerator.sync_gradients,
        skipped=lambda: accelerator.optimizer_step_was_skipped,
        scaled=_loss_scaler(accelerator),
    )


def _loss_scaler(accelerator: Accelerator) -> Callable[[Tensor], Tensor] | None:
    scaler = accelerator.scaler
    if scaler is not None:
        scale: Callable[[Tensor], Tensor] = scaler.scale
        return scale
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.mixed_precision == "fp16":
        # DeepSpeed's loss scale is in the optimizer, which exists only after `prepare`
        return deepspeed_loss_scaler(lambda: accelerator._optimizers[0].optimizer)
    return None


def data_parallel_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The ranks that hold different samples or tokens, over which gradients are averaged; None for all ranks.

    With a device mesh, these are the ranks along its data-parallel and context-parallel axes. Tensor-parallel
    ranks hold the same samples, so they are not counted twice.

    Raises:
        ValueError: the mesh has no such axis with a known name, or sequences are split by DeepSpeed.
    """
    if (size := split_sequences(accelerator, "sp_size")) > 1:
        raise sums_gradients(size)
    mesh = accelerator.torch_device_mesh
    if mesh is None:
        return None
    names = mesh.mesh_dim_names or ()
    axes = [name for name in names if name.startswith("dp") or name == "cp"]
    if not axes:
        raise ValueError(
            f"no data-parallel axis in the device mesh {names}; pass the group yourself: "
            "Balancer(..., group=mesh[axis].get_group())"
        )
    # Accelerate flattens dp_replicate and dp_shard into dp, and these with cp into dp_cp
    name = axes[0] if len(axes) == 1 else "dp_cp" if "cp" in axes else "dp"
    group: dist.ProcessGroup = mesh[name].get_group()
    return group


def check_launch(accelerator: Accelerator, environment: Mapping[str, str] = os.environ) -> None:
    """Compares what the launcher was asked for with what really runs.

    Known silent fallbacks: `accelerate launch --cpu --num_processes 2` runs one process.
    `Accelerator(cpu=True)` turns a DeepSpeed or FSDP configuration into plain data parallelism.
    `Accelerator()` on a CPU without a backend makes every rank believe that it is alone.

    Raises:
        RuntimeError: the two differ; the message says what to change.
    """
    got, kind = accelerator.num_processes, accelerator.distributed_type
    asked = _asked_processes(environment)
    if asked is not None and asked != got:
        raise RuntimeError(
            f"{asked} processes were asked for, but this run has {got} ({kind.value}). Start it with "
            f"`torchrun --nproc_per_node {asked}` or `accelerate launch --multi_gpu --num_processes {asked}`"
            ". On a CPU, also use `Accelerator(cpu=True)` or set ACCELERATE_USE_CPU=true"
        )
    if asked is None and got == 1 and _launched_alone(environment):
        raise RuntimeError(
            "accelerate launch was asked for several processes on the CPU but started one, because its --cpu "
            "launcher needs MPI. Use `torchrun --nproc_per_node N`, or ACCELERATE_USE_CPU=true and "
            "`accelerate launch --multi_gpu --num_processes N`"
        )
    for variable, wanted in _ENGINES.items():
        if _flag(variable, environment) and kind != wanted:
            raise RuntimeError(
                f"{variable} asks for {wanted.value}, but Accelerate runs {kind.value}. "
                + _WITHOUT_DEVICE[wanted]
            )


_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": DistributedType.DEEPSPEED,
    "ACCELERATE_USE_FSDP": DistributedType.FSDP,
}

_WITHOUT_DEVICE = {
    DistributedType.DEEPSPEED: (
        "Do not pass cpu=True to Accelerator, and do not set ACCELERATE_USE_CPU. On a CPU, give DeepSpeed "
        'its backend: Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])'
    ),
    DistributedType.FSDP: (
        "Accelerate runs FSDP only on accelerators, and never with cpu=True. On a CPU, use DeepSpeed "
        "ZeRO-3, or torch's fully_shard without Accelerate"
    ),
}


def _flag(variable: str, environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(variable, "").lower() in ("1", "true", "yes")


def _asked_processes(environment: Mapping[str, str]) -> int | None:
    for variable in (EXPECTED_PROCESSES, "WORLD_SIZE"):
        text = environment.get(variable, "")
        if re.fullmatch("[0-9]{1,9}", text) and int(text):
            return int(text)
        if text and variable == EXPECTED_PROCESSES:
            raise RuntimeError(
                f"{variable} must be a number of processes >= 1, got {text!r}: correct or unset it"
            )
    return None


def _launched_alone(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate started one process instead of several: it then sets a master port, but no rank."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment
    return launched and "MASTER_PORT" in environment and "RANK" not in environment

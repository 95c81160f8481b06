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

from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer
from mtl_dist.engines import Engine, deepspeed_facts
from mtl_dist.integrations._attached import check_given
from mtl_dist.integrations._idle import IdleWatch, call_after
from mtl_dist.integrations._sequences import sums_gradients

_WATCHES: WeakKeyDictionary[Any, IdleWatch] = WeakKeyDictionary()


def attach(balancer: Balancer, engine: Any, *, late: bool = False) -> Balancer:
    """Connects `balancer` to a `DeepSpeedEngine`: process group, ZeRO stage, loss scale, accumulation.

    Call it before the first step. If the first optimizer step of the engine did not pass through the
    balancer, `engine.step` raises `RuntimeError`.

    Args:
        balancer: the balancer in the engine's model.
        engine: what `deepspeed.initialize` returned first.
        late: whether the training may begin without the balancer.

    Returns:
        The same balancer.

    Raises:
        TypeError: `engine` is not a `DeepSpeedEngine`, or it is a `PipelineEngine`.
        ValueError: a combination that does not work; the message says what to change.
    """
    check_given(balancer)
    check_engine(engine)
    balancer.set_engine(deepspeed_facts(engine))
    balancer.set_group(data_parallel_group(engine))
    if not late:
        _watch(engine).add(balancer)
    return balancer


def detach(balancer: Balancer, engine: Any) -> None:
    """Undoes `attach`: the balancer no longer knows the engine."""
    balancer.set_engine(Engine())
    if engine in _WATCHES:
        _WATCHES[engine].remove(balancer)


def _watch(engine: Any) -> IdleWatch:
    if engine in _WATCHES:
        return _WATCHES[engine]
    watch = _WATCHES[engine] = IdleWatch(
        1,
        "Call balancer(features, heads) in the forward of the engine's model, and give the scalar that it "
        "returns to engine.backward",
    )
    steps = engine.global_steps

    def after_step() -> None:
        nonlocal steps
        if engine.global_steps > steps:  # not inside an accumulation
            watch.after_step()
        steps = engine.global_steps

    call_after(engine, "step", after_step)
    return watch


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


def data_parallel_group(engine: Any) -> dist.ProcessGroup:
    """The ranks that hold different samples, over which the engine averages gradients.

    With tensor parallelism (an `mpu`), ranks that hold the same samples are not counted twice.

    Raises:
        ValueError: sequence parallelism, under which DeepSpeed sums gradients instead of averaging them.
    """
    if engine.sequence_parallel_size > 1:
        raise sums_gradients(engine.sequence_parallel_size)
    group: dist.ProcessGroup = engine.seq_data_parallel_group
    return group

"""`attach` and `detach` for HF Trainer."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Mapping, Sized
from functools import wraps
from typing import Any
from weakref import ref

from accelerate.utils import DistributedType
from transformers import Trainer

from mtl_dist.balancer import Balancer
from mtl_dist.integrations import accelerate
from mtl_dist.integrations._attached import check_given
from mtl_dist.integrations._checkpoints import attached_to
from mtl_dist.integrations._evaluation_rows import Weights, checked_weights
from mtl_dist.integrations._trainer_callback import BalancerCallback, Settings, place_of
from mtl_dist.tracking import Row, check_task_names

_LOGGER = logging.getLogger("mtl_dist")
_BALANCER = "_mtl_dist_balancer"  # attribute of a function that balances


def attach(
    balancer: Balancer,
    trainer: Trainer,
    *,
    name: str = "balancer",
    eval_weights: Weights | None = None,
    late: bool = False,
) -> Balancer:
    """Connects `balancer` to `trainer` (process group, accumulation, logs, checkpoints) before `train`.

    If `train` makes a new model (`model_init`), the balancer at the same place in the new model takes over.
    The trainer does not keep the balancer alive.

    Args:
        balancer: the balancer in the model of the trainer.
        trainer: a `Trainer`, or a subclass in which the model still computes the loss.
        name: name of the balancer in checkpoints. A second balancer needs another name, which is then also
            part of its keys (`mtl/<name>/weight/<task>`).
        eval_weights: fixed weight of each task in `eval_total_loss`; None: `1 / n` each.
        late: whether the training may begin without the balancer. Otherwise the first optimizer step whose
            loss did not pass through it raises an error.

    Returns:
        The same balancer.

    Raises:
        RuntimeError: the launch fell back silently (`accelerate.check_launch`).
        ValueError: a combination that does not work; the message says what to change. Or a task name that
            no column of Trainer's logs can have.
    """
    check_given(balancer)
    check_task_names(balancer.tasks)
    weights = checked_weights(balancer, eval_weights)
    _check(trainer)
    place = None if trainer.model is None else place_of(balancer, trainer.model)
    if place is None and trainer.model_init is not None:
        raise ValueError(
            f"the balancer of the tasks {list(balancer.tasks)} is not a part of trainer.model, and "
            "model_init makes a new model in each train(): make the balancer in model_init's model, and "
            "attach that of trainer.model"
        )
    _check_batches(trainer)
    _divide_once(trainer)
    callback = _callback_of(trainer)
    accelerate.connect(
        balancer, trainer.accelerator, name=name, accumulation=trainer.args.gradient_accumulation_steps
    )
    # The scalar is a mean over its micro-batch. If the model's forward has **kwargs, Trainer assumes that the
    # loss is already divided by the number of labels in the whole step, and multiplies it by the world size.
    trainer.model_accepts_loss_kwargs = False
    callback.add(balancer, name, Settings(place, weights, eval_weights is not None, late))
    callback.check_choice(trainer.args)
    return balancer


def detach(balancer: Balancer | str, trainer: Trainer) -> None:
    """Undoes `attach`: the trainer's logs and checkpoints no longer have the balancer.

    Args:
        balancer: the balancer, or its name.
        trainer: what it is attached to.

    Raises:
        ValueError: it is not attached.
    """
    callback = _callback_of(trainer)
    name = callback.remove(balancer)
    if name in attached_to(trainer.accelerator).live():
        accelerate.detach(name, trainer.accelerator)


def _check(trainer: Trainer) -> None:
    args = trainer.args
    if trainer.compute_loss_func is not None or trainer.label_smoother is not None:
        given = "compute_loss_func" if trainer.compute_loss_func is not None else "label_smoothing_factor"
        raise ValueError(
            f"{given} replaces the loss that the model returns, which is the balancer's scalar: compute "
            "the tasks' losses in the model's forward, and return the balancer's scalar as the loss"
        )
    if getattr(trainer, "loss_is_scaled_for_ga", None):  # not in all versions
        raise ValueError(
            "loss_is_scaled_for_ga=True, but the balancer's scalar is a mean over one micro-batch, which "
            "Trainer must divide by the accumulation steps: set it to None"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"Trainer runs {args.n_gpu} GPUs in one process (DataParallel), each with its own balancer: "
            f"start it with `torchrun --nproc_per_node {args.n_gpu}`"
        )
    if args.restore_callback_states_from_checkpoint:
        raise ValueError(
            "restore_callback_states_from_checkpoint creates new callbacks without their balancers: set it "
            "to False. The balancer is restored without it"
        )


def _check_batches(trainer: Trainer) -> None:
    """Raises `ValueError` where some ranks have one batch more, for which they would wait for the others."""
    args, data = trainer.args, trainer.train_dataset
    even = getattr(trainer.accelerator, "even_batches", True) or args.dataloader_drop_last
    if even or args.world_size == 1 or not isinstance(data, Sized):
        return
    batches = math.ceil(len(data) / args.train_batch_size)
    if batches % args.world_size:
        raise ValueError(
            f"even_batches=False: {args.world_size} ranks share {batches} batches, so some have one more and "
            "would wait for the others in it: leave even_batches out, or set dataloader_drop_last=True"
        )


def _divide_once(trainer: Trainer) -> None:
    """Trainer divides the loss by the accumulation steps; until transformers 5.3 Accelerate did so again."""
    accelerator = trainer.accelerator
    steps = accelerator.gradient_accumulation_steps
    # DeepSpeed's engine is told not to divide
    if steps > 1 and accelerator.distributed_type != DistributedType.DEEPSPEED:
        accelerator.gradient_accumulation_steps = 1
        _LOGGER.warning(
            "mtl_dist: this Trainer divides the loss by the %d accumulation steps, and Accelerate divides it "
            "again, so gradients would be too small by that factor. attach told Accelerate not to",
            steps,
        )


def _callback_of(trainer: Trainer) -> BalancerCallback:
    callbacks = trainer.callback_handler.callbacks
    for callback in callbacks:
        if isinstance(callback, BalancerCallback):
            return callback
    callback = BalancerCallback(trainer)
    callbacks.insert(0, callback)  # before the callbacks of trackers, which read what it adds
    _collect_evaluations(trainer, callback)
    return callback


def _collect_evaluations(trainer: Trainer, callback: BalancerCallback) -> None:
    """Adds each task's loss to the metrics of `evaluate` and `predict`."""
    inner = trainer.evaluation_loop
    signature = inspect.signature(inner)

    @wraps(inner)
    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        given: Mapping[str, Any] = signature.bind(*args, **kwargs).arguments
        row: Row = {}
        with callback.evaluating(row, given.get("metric_key_prefix", "eval")):
            output = inner(*args, **kwargs)
        return output._replace(metrics={**(output.metrics or {}), **row})

    trainer.evaluation_loop = evaluation_loop  # type: ignore[method-assign]  # what a subclass would override


def check_alone(replaced: Any, trainer: Trainer) -> None:
    """Raises `ValueError` where another balancer that is still attached has taken the place already."""
    taken = getattr(replaced, _BALANCER, None)
    live = attached_to(trainer.accelerator).live()
    names = [name for name, balancer in live.items() if taken is not None and balancer is taken()]
    if names:
        raise ValueError(
            f"the loss of this model is balanced by {names[0]!r} already, and a second balancer would take "
            f"its place: call this once, or detach({names[0]!r}, trainer) before"
        )


def take(replacing: Any, balancer: Balancer) -> None:
    """Notes on the function that takes a place whose balancer it is."""
    setattr(replacing, _BALANCER, ref(balancer))


def base_model(model: Any) -> Any:
    """The model of `transformers` inside PEFT's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def evaluates_as_before(trainer: Trainer, accepts_loss_kwargs: bool) -> None:
    """`attach` tells Trainer that the loss is a mean over the micro-batch, which is so in training only."""
    inner = trainer.prediction_step

    @wraps(inner)
    def prediction_step(*args: Any, **kwargs: Any) -> Any:
        in_training, trainer.model_accepts_loss_kwargs = (
            trainer.model_accepts_loss_kwargs,
            accepts_loss_kwargs,
        )
        try:
            return inner(*args, **kwargs)
        finally:
            trainer.model_accepts_loss_kwargs = in_training

    trainer.prediction_step = prediction_step  # type: ignore[method-assign]  # as above

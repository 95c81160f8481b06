"""What happens before the first step: start the engine, check the output folder, build the objects."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, send_to_device, set_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from mtl_dist.balancer import Balancer
from mtl_dist.integrations.accelerate import attach, start
from mtl_dist.recipes import Batch, BatchData, Recipe
from mtl_dist.tracking.files import REPORT, RUN, SUMMARY
from mtl_dist.training.batches import StepBatches, train_loader
from mtl_dist.training.checkpoints import (
    move_aside,
    remove_checkpoint,
    remove_unfinished,
    space_needed,
    traces_of,
)
from mtl_dist.training.contract import check_data, check_model
from mtl_dist.training.engine import take_inputs_as_parameters
from mtl_dist.training.files import write_json
from mtl_dist.training.optimizer import build_optimizer
from mtl_dist.training.resume import Start, check_rows
from mtl_dist.training.settings import Settings, build_balancer, run_identity
from mtl_dist.training.storage import alone_in, check_shared, check_storage, explain_storage
from mtl_dist.training.together import everyone, raise_together
from mtl_dist.virtual import VirtualRanks

_LOGGER = logging.getLogger("mtl_dist")


@dataclass(frozen=True)
class Run:
    """The objects of a run, prepared for the engine.

    Attributes:
        settings: the validated settings.
        recipe: data, model and metrics.
        accelerator: accelerator of this process.
        balancer: the balancer inside `model`.
        model: the model, wrapped by the engine.
        optimizer: the optimizer, wrapped by the engine.
        loader: this rank's part of the remaining global batches.
        eval_data: all validation samples.
        ranks: the virtual ranks of this process; None for real ranks.
    """

    settings: Settings
    recipe: Recipe
    accelerator: Accelerator
    balancer: Balancer
    model: nn.Module
    optimizer: Any
    loader: DataLoader[Batch]
    eval_data: BatchData
    ranks: VirtualRanks | None = None


def build_run(settings: Settings, accelerator: Accelerator, done: int) -> Run:
    """Builds everything from `settings`. All ranks call it.

    Args:
        settings: settings of the run.
        accelerator: that of `make_accelerator`.
        done: number of optimizer steps already done.

    Raises:
        RunError: on every rank, if there is too little space for the checkpoints.
        ValueError: settings that do not work together.
    """
    set_seed(settings.seed)
    recipe = settings.recipe.object
    train_data, eval_data = check_data(recipe, recipe.data(settings.seed))
    balancer = build_balancer(settings)
    model = check_model(recipe, recipe.model(balancer))
    _check_space(settings, accelerator, model, done)
    take_inputs_as_parameters(model)
    optimizer = build_optimizer(
        settings.optimizer, model.parameters(), settings.learning_rate, settings.weight_decay
    )
    sampler = StepBatches(
        len(train_data), settings.batch_size, settings.seed, done, settings.steps, settings.accumulation
    )
    loader = train_loader(train_data, sampler, settings.num_workers)
    model, prepared, loader = accelerator.prepare(model, optimizer, loader)
    attach(balancer, accelerator)
    if done and isinstance(model, DistributedDataParallel):
        first = StepBatches(len(train_data), settings.batch_size, settings.seed, 0, 1)
        rehearse(accelerator, model, balancer, train_data, next(iter(first)))
        prepared.zero_grad()
    ranks = VirtualRanks(settings.virtual_ranks, balancer, model) if settings.virtual_ranks > 1 else None
    return Run(settings, recipe, accelerator, balancer, model, prepared, loader, eval_data, ranks)


def rehearse(
    accelerator: Accelerator, model: nn.Module, balancer: Balancer, data: BatchData, batch: list[int]
) -> None:
    """Runs the run's first batch before a checkpoint is loaded, so that all later steps are repeated exactly.

    DDP puts gradients into buckets in another order after its first backward. With three ranks and more, the
    place in a bucket decides the order in which ranks are added. So a resumed run needs a first backward too.

    Args:
        accelerator: of the run.
        model: wrapped by the engine.
        balancer: in the model; it learns nothing.
        data: the training samples.
        batch: indices of the run's first global batch.
    """
    size, rank = len(batch) // accelerator.num_processes, accelerator.process_index
    mine = data.__getitems__(batch[rank * size : (rank + 1) * size])
    with balancer.held():
        accelerator.backward(model(**send_to_device(mine, accelerator.device)))


def make_accelerator(settings: Settings) -> Accelerator:
    """An Accelerator on the number of processes that was asked for.

    Raises:
        RuntimeError: another number of processes was started.
        ValueError: the batch size is not divisible by the number of processes, the launcher accumulates
            gradients, or the device has no float16.
    """
    minutes = settings.timeout_minutes
    timeout = None if minutes is None else timedelta(minutes=minutes)
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = start(settings.num_processes, loading, timeout, settings.precision)
    started, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    micro_batch = settings.batch_size // settings.accumulation
    if micro_batch % started:
        parts = f", and its {settings.accumulation} micro-batches" if settings.accumulation > 1 else ""
        raise ValueError(
            f"batch_size={settings.batch_size} is global{parts} and must be divisible by the {started} "
            "processes"
        )
    if settings.virtual_ranks > 1 and started > 1:
        raise ValueError(
            f"virtual_ranks={settings.virtual_ranks} needs one process, but {started} were started: "
            "remove it, or start one process (launch/debug.sh)"
        )
    if accumulation not in (1, settings.accumulation):
        raise ValueError(
            f"the launcher asks for {accumulation} gradient accumulation steps, but this run has "
            f"accumulation={settings.accumulation}; set those of the launcher to 1"
        )
    accelerator.gradient_accumulation_steps = settings.accumulation
    if settings.precision not in (None, accelerator.mixed_precision):
        raise ValueError(
            f"precision={settings.precision}, but the launcher's configuration of the engine says "
            f"{accelerator.mixed_precision}: set it there, or leave out precision"
        )
    plugin = accelerator.state.deepspeed_plugin
    if accelerator.mixed_precision == "fp16" and plugin is None and not accelerator.native_amp:
        raise ValueError(
            f"precision=fp16: on the device {accelerator.device.type!r}, Accelerate would train in float32 "
            "without a word; use precision=bf16 or precision=no"
        )
    if plugin is not None:
        # Accelerate takes it from the loader's batch_size; a loader with a batch sampler has none
        engine = plugin.deepspeed_config
        engine["train_micro_batch_size_per_gpu"] = micro_batch // started
        engine["gradient_accumulation_steps"] = settings.accumulation
        if settings.clip_norm is not None:  # DeepSpeed clips inside its optimizer step
            engine["gradient_clipping"] = settings.clip_norm
    return accelerator


def enter_output(settings: Settings, accelerator: Accelerator, held: ExitStack) -> None:
    """Makes the output folder, and keeps other runs out of it. All ranks call it, before they look into it.

    Args:
        settings: of the run.
        accelerator: of the run.
        held: lets other runs in, when it is closed.

    Raises:
        RunError: on every rank, if another run writes into the folder, or it cannot be made.
    """
    problem = None
    if accelerator.is_main_process:
        try:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
            held.enter_context(alone_in(settings.output_dir))
        except OSError as error:
            problem = explain_storage(error, settings.output_dir)
        except ValueError as error:
            problem = str(error)
    raise_together(accelerator, problem)


def claim_output(settings: Settings, accelerator: Accelerator, start: Start) -> None:
    """Makes the output folder ready for a run that begins at `start`. All ranks call it.

    An earlier run is removed unless it goes on; later checkpoints than that of `start` are renamed. Then the
    ranks look whether they see one folder, if there are checkpoints.

    Raises:
        RunError: on every rank, if the folder cannot be written, is not the same one, or has damaged rows.
    """
    everyone(accelerator, None)  # every rank has looked at the folder before one rank changes it
    problem = note = None
    if accelerator.is_main_process:
        try:
            note = check_rows(settings, start)
            _claim(settings, start)
        except OSError as error:
            problem = explain_storage(error, settings.output_dir)
        except ValueError as error:
            problem = str(error)
    raise_together(accelerator, problem)
    if note is not None:
        _LOGGER.warning("mtl_dist: %s", note)
    if settings.checkpoint_every or start.checkpoint is not None:
        check_shared(accelerator, settings.output_dir)


def _claim(settings: Settings, start: Start) -> None:
    folder = settings.output_dir
    for checkpoint in start.abandoned:
        move_aside(checkpoint)
    for path in traces_of(settings):
        if path.is_dir() and not start.continues:
            remove_checkpoint(path)
        elif path.name in (SUMMARY, REPORT) or not start.continues:
            path.unlink()
    remove_unfinished(settings)
    write_json(folder / RUN, run_identity(settings))


def _check_space(settings: Settings, accelerator: Accelerator, model: nn.Module, done: int) -> None:
    """Raises unless the checkpoints of the run fit, by what its model and Adam have at least."""
    parameters = list(model.parameters())
    size = sum(parameter.nbytes for parameter in parameters)
    if settings.optimizer in ("adamw", "adam"):
        size += sum(8 * parameter.numel() for parameter in parameters if parameter.requires_grad)
    problem = None
    if accelerator.is_main_process:
        try:
            check_storage(settings.output_dir, space_needed(settings, done, size))
        except ValueError as error:
            problem = str(error)
    raise_together(accelerator, problem)

"""What happens before the first step: start the engine, check the output folder, build the objects."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader

from mtl_dist.balancer import Balancer
from mtl_dist.integrations.accelerate import attach, start
from mtl_dist.recipes import Batch, BatchData, Recipe
from mtl_dist.tracking.files import CHECKPOINTS, METRICS, REPORT, SUMMARY, TRACKING
from mtl_dist.training.batches import StepBatches, train_loader
from mtl_dist.training.engine import take_inputs_as_parameters
from mtl_dist.training.settings import Settings, build_balancer
from mtl_dist.virtual import VirtualRanks


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


def build_run(settings: Settings, done: int) -> Run:
    """Starts the engine and builds everything from `settings`.

    Args:
        settings: settings of the run.
        done: number of optimizer steps already done.

    Raises:
        RuntimeError: the launcher did not start what was asked for.
        ValueError: settings that do not work together.
    """
    accelerator = make_accelerator(settings)
    set_seed(settings.seed)
    recipe = settings.recipe.object
    train_data, eval_data = recipe.data(settings.seed)
    balancer = build_balancer(settings)
    model = recipe.model(balancer)
    take_inputs_as_parameters(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    sampler = StepBatches(len(train_data), settings.batch_size, settings.seed, done, settings.steps)
    model, prepared, loader = accelerator.prepare(model, optimizer, train_loader(train_data, sampler))
    attach(balancer, accelerator)
    ranks = VirtualRanks(settings.virtual_ranks, balancer, model) if settings.virtual_ranks > 1 else None
    return Run(settings, recipe, accelerator, balancer, model, prepared, loader, eval_data, ranks)


def make_accelerator(settings: Settings) -> Accelerator:
    """An Accelerator on the number of processes that was asked for.

    Raises:
        RuntimeError: another number of processes was started.
        ValueError: the batch size is not divisible by the number of processes, or the launcher accumulates
            gradients.
    """
    accelerator = start(settings.num_processes, DataLoaderConfiguration(split_batches=True))
    started, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    if settings.batch_size % started:
        raise ValueError(
            f"batch_size={settings.batch_size} is global and must be divisible by the {started} processes"
        )
    if settings.virtual_ranks > 1 and started > 1:
        raise ValueError(
            f"virtual_ranks={settings.virtual_ranks} needs one process, but {started} were started: "
            "remove it, or start one process (launch/debug.sh)"
        )
    if settings.batch_size % settings.virtual_ranks:
        raise ValueError(
            f"batch_size={settings.batch_size} must be divisible by virtual_ranks={settings.virtual_ranks}"
        )
    if accumulation != 1:
        raise ValueError(
            f"the launcher asks for {accumulation} gradient accumulation steps, but in this program every "
            "batch is an optimizer step; set them to 1 and choose batch_size instead"
        )
    if accelerator.state.deepspeed_plugin is not None:
        # Accelerate takes it from the loader's batch_size; a loader with a batch sampler has none
        engine = accelerator.state.deepspeed_plugin.deepspeed_config
        engine["train_micro_batch_size_per_gpu"] = settings.batch_size // started
    return accelerator


def check_output(settings: Settings) -> None:
    """Raises an error if the output folder already has another run. Changes nothing.

    Raises:
        ValueError: it has one; the message says what to do.
    """
    if (settings.output_dir / METRICS).exists() and not (_continues(settings) or settings.overwrite):
        raise ValueError(
            f"output_dir: {str(settings.output_dir)!r} already has a run; "
            "choose another folder, resume_from=latest, or overwrite=true"
        )


def claim_output(settings: Settings, accelerator: Accelerator) -> None:
    """Creates the output folder, and removes an earlier run unless it is resumed. Call it on all ranks."""
    accelerator.wait_for_everyone()  # every rank has checked the folder before one rank changes it
    if accelerator.is_main_process:
        folder = settings.output_dir
        folder.mkdir(parents=True, exist_ok=True)
        if not _continues(settings):
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
            for name in (METRICS, SUMMARY, REPORT, TRACKING):
                (folder / name).unlink(missing_ok=True)
            for events in folder.glob("events.out.tfevents.*"):
                events.unlink()
    accelerator.wait_for_everyone()


def _continues(settings: Settings) -> bool:
    """Whether the run resumes from a checkpoint of its own output folder."""
    if settings.resume_from is None:
        return False
    own = settings.output_dir.resolve() in Path(settings.resume_from).resolve().parents
    return settings.resume_from == "latest" or own

"""Checkpoints of a run: complete or absent, found by step, and refused by other runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mtl_dist.tracking.files import CHECKPOINT_PATTERN, CHECKPOINTS, TRACKING
from mtl_dist.training.settings import Settings

_META = "mtl_dist.json"


def save_checkpoint(accelerator: Accelerator, settings: Settings, step: int) -> Path:
    """Writes `checkpoints/step_<step>` of the output folder; call it on all ranks.

    A checkpoint is written under another name, and renamed when all ranks have finished. A folder `step_*` is
    therefore complete, even if the run is killed.
    """
    final = settings.output_dir / CHECKPOINTS / f"step_{step:08d}"
    unfinished = final.with_suffix(".tmp")
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        meta = {"step": step, "num_processes": accelerator.num_processes, **_identity(settings)}
        (unfinished / _META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        if (
            settings.output_dir / TRACKING
        ).is_file():  # the trackers continue their run when this one is resumed
            shutil.copy(settings.output_dir / TRACKING, unfinished)
        if final.exists():  # the run was resumed from an earlier step and repeats this one
            shutil.rmtree(final)
        unfinished.replace(final)
    accelerator.wait_for_everyone()
    return final


def find_checkpoint(settings: Settings) -> tuple[Path | None, int]:
    """The checkpoint that `resume_from` names, and its number of optimizer steps; (None, 0) for a new run.

    Raises:
        ValueError: there is no checkpoint, it belongs to another run, or no step is left to train.
    """
    if settings.resume_from is None:
        return None, 0
    folder = _latest(settings) if settings.resume_from == "latest" else Path(settings.resume_from)
    if not (folder / _META).is_file():
        raise ValueError(
            f"resume_from: {str(folder)!r} is not a checkpoint; give a folder step_* or 'latest'"
        )
    meta: dict[str, Any] = json.loads((folder / _META).read_text(encoding="utf-8"))
    for key, value in _identity(settings).items():
        if meta[key] != value:
            raise ValueError(
                f"resume_from: {str(folder)!r} was trained with {key}={meta[key]}, this run has {value}; "
                "restore the setting, or start a new run without resume_from"
            )
    step = int(meta["step"])
    if step >= settings.steps:
        raise ValueError(
            f"resume_from: {str(folder)!r} is at step {step} of {settings.steps}; increase steps"
        )
    return folder, step


def _latest(settings: Settings) -> Path:
    folder = settings.output_dir / CHECKPOINTS
    found = sorted(folder.glob(CHECKPOINT_PATTERN))
    if not found:
        raise ValueError(f"resume_from: 'latest', but there is no checkpoint in {str(folder)!r}")
    return found[-1]


def _identity(settings: Settings) -> dict[str, Any]:
    """The settings that a resumed run must not change: they determine data, order, model and state."""
    return {
        "recipe": repr(settings.recipe.object),
        "weighting": repr(settings.weighting.object),
        "probe": repr(settings.probe.object),
        "seed": settings.seed,
        "batch_size": settings.batch_size,
    }

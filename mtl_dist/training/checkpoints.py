"""Writes the checkpoints of a run: complete and on the disk, or absent.

`Accelerator.save_state` writes what belongs to the engine. It is the one writer that knows all of them:
torch's distributed checkpoint cannot hold the state of a DeepSpeed engine, and would need a second form of
everything. What `save_state` does not do is done here: flush, manifest, rename.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator

from mtl_dist.durable import flush, flush_tree, move
from mtl_dist.tracking.files import (
    BEST,
    CHECKPOINT_PATTERN,
    CHECKPOINTS,
    EVENTS,
    METRICS,
    REPORT,
    RUN,
    SUMMARY,
    TRACKING,
)
from mtl_dist.training.best import best_step
from mtl_dist.training.engine import engine_name
from mtl_dist.training.manifest import MANIFEST, Manifest, digest
from mtl_dist.training.settings import Settings, run_identity
from mtl_dist.training.storage import storage_in_words, tree_size
from mtl_dist.training.together import everyone


def save_checkpoint(accelerator: Accelerator, settings: Settings, step: int) -> Path:
    """Writes `checkpoints/step_<step>` of the output folder; call it on all ranks.

    It is written under another name, flushed to the disk with its manifest, and then renamed. So a folder
    `step_*` is complete, even if the run is killed or the power is cut. Then the oldest ones are removed, if
    `keep_last` says so.

    Raises:
        RunError: it could not be written, on the rank that could not; the launcher ends the others.
    """
    final = settings.output_dir / CHECKPOINTS / f"step_{step:08d}"
    unfinished = final.with_suffix(".tmp")
    earlier = checkpoints_of(settings)
    try:
        with storage_in_words(settings.output_dir, need=tree_size(earlier[-1]) if earlier else 0):
            _write(accelerator, settings, step, unfinished)
            if accelerator.is_main_process:
                if (settings.output_dir / METRICS).is_file():
                    flush(settings.output_dir / METRICS)  # rows and checkpoints tell the same steps
                if final.exists():  # saved twice
                    remove_checkpoint(final)
                move(unfinished, final)
                for old in checkpoints_of(settings)[: -settings.keep_last] if settings.keep_last else ():
                    if old.name != f"step_{best_step(settings.output_dir) or 0:08d}":
                        remove_checkpoint(old)
    except Exception:
        shutil.rmtree(unfinished, ignore_errors=True)  # a full disk stays full otherwise
        raise
    everyone(accelerator, None)
    return final


def space_needed(settings: Settings, done: int, size: int) -> int:
    """Bytes that the checkpoints of a run need until its end, beside those that are there.

    Args:
        settings: of the run.
        done: optimizer steps done.
        size: bytes of one checkpoint.
    """
    every = settings.checkpoint_every
    planned = settings.steps // every - done // every if every else 0
    if settings.keep_last is not None:  # the oldest is removed when the newest is there
        kept = settings.keep_last + (settings.best_metric is not None)
        planned = min(planned, max(1, kept + 1 - len(checkpoints_of(settings))))
    return planned * size


def checkpoints_of(settings: Settings) -> list[Path]:
    """The finished checkpoints of the output folder, oldest first."""
    return sorted((settings.output_dir / CHECKPOINTS).glob(CHECKPOINT_PATTERN))


def traces_of(settings: Settings) -> list[Path]:
    """What a run has left in the output folder: the files and folders that a new run would replace."""
    folder = settings.output_dir
    files = [folder / name for name in (METRICS, RUN, SUMMARY, REPORT, TRACKING, BEST)]
    found = [path for path in files if path.exists()]
    return found + sorted((folder / CHECKPOINTS).glob(f"{CHECKPOINT_PATTERN}*")) + sorted(folder.glob(EVENTS))


def remove_checkpoint(folder: Path) -> None:
    """Removes a checkpoint. It is gone at once: a kill leaves no half of it under its name."""
    unfinished = folder.with_suffix(".old.tmp")
    move(folder, unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(settings: Settings) -> None:
    """Removes what kills have left: checkpoints that were being written or removed."""
    for folder in (settings.output_dir / CHECKPOINTS).glob("*.tmp"):
        shutil.rmtree(folder)


def move_aside(folder: Path) -> Path:
    """Renames a checkpoint that the run does not continue, so that `latest` does not find it."""
    number, target = 1, folder.with_suffix(".abandoned")
    while target.exists():
        number += 1
        target = folder.with_suffix(f".abandoned-{number}")
    move(folder, target)
    return target


def _write(accelerator: Accelerator, settings: Settings, step: int, folder: Path) -> None:
    """All of a checkpoint, flushed."""
    if accelerator.is_main_process:
        remove_unfinished(settings)
        folder.mkdir(parents=True)
    everyone(accelerator, None)
    accelerator.save_state(str(folder))
    if accelerator.is_main_process and (settings.output_dir / TRACKING).is_file():
        # the trackers continue their run when this one is resumed
        shutil.copy(settings.output_dir / TRACKING, folder)
    everyone(accelerator, None)
    if accelerator.is_local_main_process:
        flush_tree(folder)
    everyone(accelerator, None)
    # every rank reads its share: a large checkpoint would keep one rank busy for minutes
    rank, number = accelerator.process_index, accelerator.num_processes
    files = everyone(accelerator, sorted(path for path in folder.rglob("*") if path.is_file()))[0]
    mine = {
        path.relative_to(folder).as_posix(): (path.stat().st_size, digest(path))
        for path in files[rank::number]
    }
    found = everyone(accelerator, mine)
    if accelerator.is_main_process:
        rows = {name: row for part in found for name, row in part.items() if name != MANIFEST}
        Manifest(
            step, number, engine_name(accelerator), run_identity(settings), dict(sorted(rows.items()))
        ).write(folder)

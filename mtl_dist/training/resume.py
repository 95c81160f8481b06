"""Where a run begins: at its start, or at a checkpoint that is whole and its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mtl_dist.tracking import RowReader
from mtl_dist.tracking.files import METRICS, RUN, SUMMARY
from mtl_dist.tracking.keys import STEP_KEY
from mtl_dist.training.checkpoints import checkpoints_of, traces_of
from mtl_dist.training.engine import engine_name
from mtl_dist.training.files import read_json
from mtl_dist.training.manifest import Damaged, Manifest, find_damage, read_manifest
from mtl_dist.training.settings import Settings, run_identity
from mtl_dist.training.together import everyone, raise_together

_REMEDY = "restore the setting, or start a new run without resume_from"


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: what it loads; None for a new run.
        done: optimizer steps done.
        continues: whether it goes on in the folder of the run that it continues.
        finished: whether nothing is left to do.
        abandoned: later checkpoints of its folder, which it does not continue.
        notes: what the user should know, one sentence each.
    """

    checkpoint: Path | None = None
    done: int = 0
    continues: bool = False
    finished: bool = False
    abandoned: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def resume_from(settings: Settings) -> str | None:
    """`resume_from`; "auto" where it is not set and torchrun restarts workers.

    Raises:
        ValueError: each restart would remove the run.
    """
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if settings.resume_from is not None or restarts == "0":
        return settings.resume_from
    if settings.overwrite:
        raise ValueError(
            f"overwrite=true: torchrun restarts this run up to {restarts} times, and each start would remove "
            "what the one before trained: remove the earlier run yourself, or choose another output_dir"
        )
    return "auto"


def launch_notes() -> tuple[str, ...]:
    """What the user should know about restarts by torchrun."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if restarts and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return (
            "torchrun's restarts can fail with 'Connection refused' (torch 2.13 lets new ranks read the "
            "addresses of dead ones): start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        )
    return ()


def find_start(settings: Settings, known: Mapping[Path, str] | None = None) -> Start:
    """Where the run begins, from what stands in its folder. Reads no large file, and changes nothing.

    Args:
        settings: of the run.
        known: checkpoints whose content is damaged, with the words.

    Raises:
        ValueError: there is no checkpoint, it is damaged or belongs to another run, no step is left to train,
            or the folder has another run.
    """
    wanted = resume_from(settings)
    if wanted is None:
        return _at_the_start(settings)
    named = () if wanted in ("auto", "latest") else (Path(wanted),)
    notes: list[str] = []
    for folder in named or reversed(checkpoints_of(settings)):
        try:
            return _at(settings, folder, known or {}, notes, auto=wanted == "auto")
        except Damaged as error:
            if wanted != "auto":
                raise ValueError(
                    f"resume_from: {error}; copy it again, or take the one before (resume_from=auto does)"
                ) from None
            notes.append(f"{error}; it is not used")
    if wanted == "latest":
        raise ValueError(
            "resume_from: 'latest', but there is no checkpoint in "
            f"{str(settings.output_dir / 'checkpoints')!r}"
        )
    return _anew(settings, notes)


def agree_on_start(accelerator: Accelerator, settings: Settings) -> Start:
    """`find_start` after reading every file of the checkpoint, the same on every rank. All ranks call it.

    Each rank reads a share of the files.

    Raises:
        RunError: on every rank, for what `find_start` refuses, and if the engine cannot load the checkpoint.
    """
    known: dict[Path, str] = {}
    while True:
        start, problem = None, None
        if accelerator.is_main_process:
            try:
                start = find_start(settings, known)
                if start.checkpoint is not None:
                    _check_engine(accelerator, start.checkpoint)
            except ValueError as error:
                problem = str(error)
        raise_together(accelerator, problem)
        start = everyone(accelerator, start)[0]
        assert start is not None  # otherwise rank 0 had a problem
        if start.checkpoint is None or start.finished:
            return start
        damage = everyone(accelerator, _my_damage(accelerator, start.checkpoint))
        found = next((words for words in damage if words is not None), None)
        if found is None:
            return start
        known[start.checkpoint] = found


def last_row(settings: Settings, step: int) -> dict[str, Any] | None:
    """The row of `step` in the run's metrics; None if there is none."""
    path = settings.output_dir / METRICS
    rows = RowReader(path).up_to(step) if path.is_file() else ()
    return next((row for row in rows if row.get(STEP_KEY) == step), None)


def _my_damage(accelerator: Accelerator, folder: Path) -> str | None:
    try:
        manifest = read_manifest(folder)
    except ValueError as error:  # this machine sees another folder than rank 0
        return str(error)
    return find_damage(
        folder, manifest, list(manifest.files)[accelerator.process_index :: accelerator.num_processes]
    )


def _at_the_start(settings: Settings) -> Start:
    if not settings.overwrite and (traces := traces_of(settings)):
        raise ValueError(
            f"output_dir: {str(settings.output_dir)!r} already has a run; choose another folder, "
            f"resume_from=auto (go on where it stopped), or overwrite=true; found {traces[0].name}"
        )
    return Start()


def _anew(settings: Settings, notes: list[str]) -> Start:
    """A start under `auto`, in a folder without a whole checkpoint."""
    folder = settings.output_dir
    if not traces_of(settings):
        return Start(notes=tuple(notes))
    if (identity := read_json(folder / RUN)) is None:
        raise ValueError(
            f"resume_from: {str(folder)!r} has a run without a checkpoint, and does not tell its settings; "
            f"choose another folder, or overwrite=true without resume_from"
        )
    _check_identity(settings, folder, identity)
    notes.append(f"{str(folder)!r} has no whole checkpoint: the run begins again")
    return Start(continues=True, abandoned=tuple(checkpoints_of(settings)), notes=tuple(notes))


def _at(
    settings: Settings, folder: Path, known: Mapping[Path, str], notes: list[str], *, auto: bool
) -> Start:
    """The start at a checkpoint."""
    if folder in known:
        raise Damaged(known[folder])
    try:
        manifest = read_manifest(folder)
    except Damaged:
        raise
    except ValueError as error:
        raise ValueError(f"resume_from: {error}") from None
    _check_identity(settings, folder, manifest.identity)
    done, continues = manifest.step, settings.output_dir.resolve() in folder.resolve().parents
    ended = auto and done == settings.steps and last_row(settings, done) is not None
    if done >= settings.steps and not ended:
        raise ValueError(
            f"resume_from: {str(folder)!r} is at step {done} of {settings.steps}; increase steps"
        )
    later = tuple(path for path in checkpoints_of(settings) if path.name > folder.name) if continues else ()
    if not continues:
        _at_the_start(settings)  # the folder must not have another run
    if later:
        names = ", ".join(path.name for path in later)
        notes.append(
            f"going on from {folder.name}; {names} get the ending .abandoned: delete them when you like"
        )
    return Start(folder, done, continues, ended and _has_summary(settings), later, tuple(notes))


def check_rows(settings: Settings, start: Start) -> str | None:
    """What the user should know of the rows that a run goes on from; None: they reach its checkpoint.

    Raises:
        ValueError: a row before the checkpoint is damaged.
    """
    path, last = settings.output_dir / METRICS, 0.0
    if not start.continues or start.checkpoint is None:
        return None
    if path.is_file():
        last = max((row[STEP_KEY] for row in RowReader(path).up_to(start.done)), default=0)
    if last >= start.done - start.done % settings.log_every:
        return None
    return f"{METRICS} ends at step {last:g}, and {start.checkpoint.name} goes on: rows are missing between"


def _has_summary(settings: Settings) -> bool:
    summary = read_json(settings.output_dir / SUMMARY)
    return summary is not None and summary.get("steps") == settings.steps


def _check_identity(settings: Settings, folder: Path, identity: Mapping[str, Any]) -> None:
    for key, value in run_identity(settings).items():
        if identity.get(key) != value:
            raise ValueError(
                f"resume_from: {str(folder)!r} was trained with {key}={identity.get(key)}, this run has "
                f"{value}; {_REMEDY}"
            )


def _check_engine(accelerator: Accelerator, folder: Path) -> None:
    """Raises unless the engine of this run can load what another one wrote."""
    manifest: Manifest = read_manifest(folder)
    engine, number = engine_name(accelerator), accelerator.num_processes
    if manifest.engine != engine:
        raise ValueError(
            f"resume_from: {str(folder)!r} was written by the engine {manifest.engine}, and this run has "
            f"{engine}: resume with the same engine"
        )
    if engine.startswith("zero") and manifest.num_processes != number:
        raise ValueError(
            f"resume_from: {str(folder)!r} was written by {manifest.num_processes} processes, and this run "
            f"has {number}: DeepSpeed divides its state by the number of processes, so resume with as many"
        )

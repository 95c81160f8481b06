"""What a run records while it trains: rows, tracker names, step times, the text of the progress bar."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mtl_dist.tracking import Row, RunInfo, RunLog
from mtl_dist.tracking.files import TRACKING
from mtl_dist.training.files import read_json, write_json
from mtl_dist.training.settings import Settings, build_trackers
from mtl_dist.training.setup import Run

_LOGGER = logging.getLogger("mtl_dist")
_FEW = 4  # number of tasks that fit into a progress bar


def open_log(run: Run, done: int, checkpoint: Path | None) -> RunLog:
    """The log of a run. Only the main process has the trackers of the settings.

    Args:
        run: the prepared run.
        done: number of optimizer steps already done.
        checkpoint: the checkpoint that the run continues; None for a new run.
    """
    settings = run.settings
    config = {
        **settings.model_dump(mode="json"),
        "tasks": list(run.recipe.tasks),
        "rule": repr(settings.weighting.object),
        "probe": repr(run.balancer.probe),
        "num_processes": run.accelerator.num_processes,
        "device": run.accelerator.device.type,
        "distributed_type": run.accelerator.distributed_type.value,
    }
    earlier = {} if checkpoint is None else earlier_ids(settings, checkpoint)
    info = RunInfo(settings.output_dir, run.recipe.tasks, config, done, earlier)
    trackers = build_trackers(settings) if run.accelerator.is_main_process else []
    return RunLog(trackers, info, settings.log_every)


def earlier_ids(settings: Settings, checkpoint: Path) -> dict[str, str]:
    """The name of the run in each tracker, from its output folder, or else from its checkpoint."""
    for folder in (settings.output_dir, checkpoint):
        if (folder / TRACKING).is_file():
            ids = read_json(folder / TRACKING)
            if ids is not None and all(isinstance(value, str) for value in ids.values()):
                return ids
            _LOGGER.warning("mtl_dist: %s is damaged: trackers may begin a new run", folder / TRACKING)
    return {}


def save_ids(settings: Settings, ids: dict[str, str]) -> None:
    """Saves the names for `earlier_ids`. A tracker that could not start this time keeps its earlier name."""
    path = settings.output_dir / TRACKING
    if ids:
        write_json(path, {**(read_json(path) or {}), **ids})


class StepClock:
    """Wall time of a training step: with logging, without validation and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0

    def tick(self) -> None:
        """Counts one finished step."""
        self._steps += 1

    def lap(self) -> float:
        """Mean milliseconds per step since the last lap."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        steps, self._steps = max(self._steps, 1), 0
        return 1e3 * elapsed / steps

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Does not count the time inside the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def postfix(row: Row | None, tasks: Sequence[str]) -> str:
    """Text for the progress bar: `task weight×loss` per task that is present, or only the extremes."""
    if row is None:
        return ""
    found = [
        (row[f"mtl/weight/{task}"], row[f"mtl/loss/{task}"], task)
        for task in tasks
        if f"mtl/loss/{task}" in row
    ]
    if len(found) <= _FEW:
        return " ".join(f"{_short(task)} {weight:.3g}×{loss:.3g}" for weight, loss, task in found)
    (low, _, lightest), (high, _, heaviest) = min(found), max(found)
    return (
        f"loss {row['train/loss']:.4g}, {len(found)} tasks, "
        f"weights {low:.3g} ({_short(lightest)}) to {high:.3g} ({_short(heaviest)})"
    )


def _short(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:7]}..{name[-7:]}"

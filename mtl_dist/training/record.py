"""What a run leaves while it trains: rows, their trackers, the time of a step, the progress bar's text."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mtl_dist.tracking import Row, RunInfo, RunLog
from mtl_dist.tracking.files import TRACKING
from mtl_dist.training.settings import Settings, build_trackers
from mtl_dist.training.setup import Run

_FEW = 4  # tasks that a progress bar has room for


def open_log(run: Run, done: int, checkpoint: Path | None) -> RunLog:
    """The log of a run: with the trackers of its settings on the main process, with none elsewhere.

    Args:
        run: prepared.
        done: optimizer steps already done.
        checkpoint: that it continues; None for a new run.
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
    """How the trackers called the run so far: as its output folder says, else its checkpoint."""
    for folder in (settings.output_dir, checkpoint):
        if (folder / TRACKING).is_file():
            ids: dict[str, str] = json.loads((folder / TRACKING).read_text(encoding="utf-8"))
            return ids
    return {}


def save_ids(settings: Settings, ids: dict[str, str]) -> None:
    """Keeps what `earlier_ids` reads; a tracker that could not start this time keeps its old name."""
    path = settings.output_dir / TRACKING
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if ids:
        path.write_text(json.dumps({**before, **ids}) + "\n", encoding="utf-8")


class StepClock:
    """Wall time of a training step, logging included, without validation and checkpoints."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._steps = 0

    def tick(self) -> None:
        """A step is over."""
        self._steps += 1

    def lap(self) -> float:
        """Milliseconds a step, the mean since the last lap."""
        now = time.perf_counter()
        elapsed, self._start = now - self._start, now
        steps, self._steps = max(self._steps, 1), 0
        return 1e3 * elapsed / steps

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What is inside takes no time."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start


def postfix(row: Row | None, tasks: Sequence[str]) -> str:
    """For the progress bar: `task weight×loss` of every task present, or the extremes where they are many."""
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

"""TensorBoard: each column is a scalar, and one chart shows the columns of all tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from mtl_dist.tracking.keys import STEP_KEY
from mtl_dist.tracking.rows import Row
from mtl_dist.tracking.tracker import RunInfo, Tracker, require

Layout = dict[str, dict[str, list[Any]]]


class TensorboardTracker(Tracker):
    """Event files in the run's folder. `tensorboard --logdir` on the parent folder compares runs.

    The tab CUSTOM SCALARS shows all tasks in one chart. A resumed run writes a second file beside the first.
    It tells TensorBoard to drop the steps that are repeated.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        require("tensorboard", self.name, "trackers")
        self._writer: Any = None
        self._where: str | None = None

    def start(self, run: RunInfo) -> None:
        """Opens an event file and writes the layout of the custom charts and the configuration as text."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        from torch.utils.tensorboard.summary import custom_scalars, text

        self._writer = EventFileWriter(str(run.folder))
        self._where = f"tensorboard --logdir {run.folder.parent} (tab CUSTOM SCALARS)"
        if run.done:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=run.done + 1, session_log=start))
        config = "```\n" + json.dumps(run.config, indent=1, default=str) + "\n```"
        layout = custom_scalars(tensorboard_layout())  # type: ignore[no-untyped-call]  # torch's
        for summary in (layout, text("config", config)):  # type: ignore[no-untyped-call]  # torch's
            self._writer.add_event(Event(wall_time=time.time(), step=run.done, summary=summary))

    def log(self, row: Row) -> None:
        """Writes one event with all columns. This costs a hundredth of one `add_scalar` call per column."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        columns = [
            Summary.Value(tag=key, simple_value=value) for key, value in row.items() if key != STEP_KEY
        ]
        event = Event(wall_time=time.time(), step=int(row[STEP_KEY]), summary=Summary(value=columns))
        self._writer.add_event(event)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Writes the remaining events and closes the file."""
        if self._writer is not None:
            self._writer.close()
            self.where = self._where


def tensorboard_layout() -> Layout:
    """Charts for `SummaryWriter.add_custom_scalars`; each chart shows the columns of all tasks.

    With Accelerate: `accelerator.get_tracker("tensorboard", unwrap=True).add_custom_scalars(...)` on the main
    process.
    """
    charts = {
        "weights": r"mtl/weight/.*",
        "contributions, part of the update": r"mtl/contribution/.*",
        "losses": r"mtl/loss/.*",
        "gradient norms": r"mtl/grad_norm/.*",
        "cosines": r"mtl/cosine/.*",
        "validation losses": r"eval/loss/.*",
    }
    single = {
        "conflict rate and entropy of the weights": ["mtl/conflict_rate", "mtl/weight_entropy"],
        "milliseconds per step": ["perf/step_ms", "perf/sync_ms"],
    }
    of_tasks = {title: ["Multiline", [pattern]] for title, pattern in charts.items()}
    return {"tasks": of_tasks, "run": {title: ["Multiline", tags] for title, tags in single.items()}}

"""Turns step reports into rows, files and charts.

A program makes one row per optimizer step (with `RunLog`, or with `step_row`) and gives it to trackers.
`TRACKERS` maps their names to their classes. The package of a tracker is imported only when a run starts.
"""

from __future__ import annotations

from mtl_dist.tracking.jsonl import JsonlTracker, JsonlWriter, RowReader, read_rows
from mtl_dist.tracking.keys import STEP_KEY, EvaluationKeys, check_task_names, evaluation_keys
from mtl_dist.tracking.rows import Row, Snapshot, step_row
from mtl_dist.tracking.run_log import RunLog
from mtl_dist.tracking.tensorboard_tracker import TensorboardTracker, tensorboard_layout
from mtl_dist.tracking.tracker import RunInfo, Tracker
from mtl_dist.tracking.trackio_tracker import TrackioTracker
from mtl_dist.tracking.wandb_tracker import WandbTracker, define_wandb_metrics

TRACKERS: dict[str, type[Tracker]] = {
    "jsonl": JsonlTracker,
    "tensorboard": TensorboardTracker,
    "trackio": TrackioTracker,
    "wandb": WandbTracker,
}

__all__ = [
    "STEP_KEY",
    "TRACKERS",
    "EvaluationKeys",
    "JsonlTracker",
    "JsonlWriter",
    "Row",
    "RowReader",
    "RunInfo",
    "RunLog",
    "Snapshot",
    "TensorboardTracker",
    "Tracker",
    "TrackioTracker",
    "WandbTracker",
    "check_task_names",
    "define_wandb_metrics",
    "evaluation_keys",
    "read_rows",
    "step_row",
    "tensorboard_layout",
]

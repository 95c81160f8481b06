"""From step reports to rows, files and charts."""

from __future__ import annotations

from mtl_dist.tracking.jsonl import METRICS_FILE, JsonlWriter, read_rows
from mtl_dist.tracking.keys import STEP_KEY, check_task_names
from mtl_dist.tracking.rows import Row, Snapshot, step_row

__all__ = [
    "METRICS_FILE",
    "STEP_KEY",
    "JsonlWriter",
    "Row",
    "Snapshot",
    "check_task_names",
    "read_rows",
    "step_row",
]

"""Reads runs back as their own tools do."""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from functools import cache
from pathlib import Path

from program import BIN, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEP = "train/global_step"


@cache
def wandb_records(folder: Path) -> list[dict[str, list[dict]]]:
    """Of every offline run in `folder`, oldest first: its records by type. Read once, so of finished runs."""
    runs = []
    for path in sorted((folder / "wandb").glob("offline-run-*")):
        done = run(BIN / "wandb", "leet", "inspect", "--json", path)
        assert done.returncode == 0, done.stderr
        records = defaultdict(list)
        for line in done.stdout.splitlines():
            record = json.loads(line)
            records[record["type"]].append(record[record["type"]])
        runs.append(records)
    return runs


def wandb_rows(records: dict[str, list[dict]]) -> list[dict[str, float]]:
    """The logged rows, without what W&B adds to each and without the closing tables."""
    items = [entry["item"] for entry in records["history"]]
    rows = [{key: value for key, value in item.items() if not key.startswith("_")} for item in items]
    return [row for row in rows if not any(key.startswith("mtl/final/") for key in row)]


def tensorboard_rows(folder: Path) -> dict[int, dict[str, float]]:
    """Columns by step."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    rows: dict[int, dict[str, float]] = defaultdict(dict)
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            rows[event.step][tag] = event.value
    return dict(rows)


def trackio_rows(folder: Path, project: str) -> list[tuple[str, str, int, dict[str, float]]]:
    """(run id, name, step, columns) in the order of logging."""
    with sqlite3.connect(folder / f"{project}.db") as connection:
        query = "select run_id, run_name, step, metrics from metrics order by id"
        return [(*row[:3], json.loads(row[3])) for row in connection.execute(query)]

"""The best checkpoint of a run, by one column of its validation rows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from mtl_dist.durable import write_whole
from mtl_dist.recipes import Recipe
from mtl_dist.tracking.files import BEST, CHECKPOINT_PATTERN, CHECKPOINTS

Mode = Literal["min", "max"]


def check_metric(metric: str, recipe: Recipe) -> None:
    """Raises `ValueError` unless validation rows of the recipe have this column."""
    columns = [f"eval/loss/{task}" for task in recipe.metrics]
    columns += [f"eval/{task}/{each.name}" for task, each in recipe.metrics.items()]
    if metric not in columns:
        raise ValueError(f"best_metric: no column {metric!r}; choose one of {', '.join(columns)}")


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint of a run; None if nothing is known."""
    path = folder / BEST
    if not path.is_file():
        return None
    best: int | None = json.loads(path.read_text(encoding="utf-8"))["step"]
    return best


def note_checkpoint(folder: Path, step: int, metric: str, mode: Mode, row: Mapping[str, float]) -> None:
    """Notes the value of a new checkpoint in `best.json`, and which one is the best.

    The main process calls it. Values of checkpoints that are no longer there are forgotten, and those of
    steps that a resumed run trains again are replaced.

    Args:
        folder: output folder of the run.
        step: the step of the checkpoint, which is about to be written.
        metric: the column.
        mode: whether a small or a large value is good.
        row: the validation row of that step. A NaN is never the best.
    """
    path, values = folder / BEST, {}
    if path.is_file():
        noted = json.loads(path.read_text(encoding="utf-8"))
        if (noted["metric"], noted["mode"]) == (metric, mode):
            there = {
                int(each.name.removeprefix("step_"))
                for each in (folder / CHECKPOINTS).glob(CHECKPOINT_PATTERN)
            }
            values = {int(key): value for key, value in noted["values"].items() if int(key) in there}
    values = {key: value for key, value in values.items() if key < step}
    if metric in row and not math.isnan(row[metric]):
        values[step] = row[metric]
    sign = 1 if mode == "min" else -1
    best = (
        min(values, key=lambda key: (sign * values[key], -key)) if values else None
    )  # of equal ones the newest
    text = {"metric": metric, "mode": mode, "step": best, "values": values}
    write_whole(path, (json.dumps(text) + "\n").encode())

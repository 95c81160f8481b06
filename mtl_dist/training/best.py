"""The best checkpoint of a run, by one column of its validation rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mtl_dist.recipes import Recipe
from mtl_dist.tracking.files import BEST, CHECKPOINT_PATTERN, CHECKPOINTS
from mtl_dist.training.files import read_json, write_json

Mode = Literal["min", "max"]

_LOGGER = logging.getLogger("mtl_dist")


def check_metric(metric: str, recipe: Recipe) -> None:
    """Raises `ValueError` unless validation rows of the recipe have this column."""
    columns = [f"eval/loss/{task}" for task in recipe.metrics]
    columns += [f"eval/{task}/{each.name}" for task, each in recipe.metrics.items()]
    if metric not in columns:
        raise ValueError(f"best_metric: no column {metric!r}; choose one of {', '.join(columns)}")


def best_step(folder: Path) -> int | None:
    """The step of the best checkpoint of a run; None if nothing is known."""
    step = (read_json(folder / BEST) or {}).get("step")
    return step if isinstance(step, int) else None


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
    path, values = folder / BEST, dict[int, float]()
    noted = read_json(path) or {}
    if path.is_file() and not _is_whole(noted):
        _LOGGER.warning("mtl_dist: %s is damaged: the best checkpoint is one of those from now on", path)
    elif (noted.get("metric"), noted.get("mode")) == (metric, mode):
        for each in (folder / CHECKPOINTS).glob(CHECKPOINT_PATTERN):
            number = int(each.name.removeprefix("step_"))
            if number < step and str(number) in noted["values"]:
                values[number] = noted["values"][str(number)]
    if metric in row and not math.isnan(row[metric]):
        values[step] = row[metric]
    sign = 1 if mode == "min" else -1
    best = (
        min(values, key=lambda key: (sign * values[key], -key)) if values else None
    )  # of equal ones the newest
    write_json(path, {"metric": metric, "mode": mode, "step": best, "values": values})


def _is_whole(noted: Mapping[str, Any]) -> bool:
    values = noted.get("values")
    return isinstance(values, dict) and all(isinstance(value, float | int) for value in values.values())

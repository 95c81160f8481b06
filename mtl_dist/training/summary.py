"""The results of a finished run: `summary.json` and the final table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mtl_dist.recipes import Recipe
from mtl_dist.tracking import Row
from mtl_dist.training.settings import Settings


def summarise(row: Row, recipe: Recipe, settings: Settings, num_processes: int) -> dict[str, Any]:
    """Summarises a run: its settings, and per task the validation loss, metric, weight and gradient norm.

    Args:
        row: row of the last step, with its validation columns.
        recipe: recipe of the run.
        settings: settings of the run.
        num_processes: number of processes that really ran.
    """
    tasks = {
        task: {
            "loss": row.get(f"eval/loss/{task}"),
            metric.name: row.get(f"eval/{task}/{metric.name}"),
            "weight": row.get(f"mtl/weight/{task}"),
            "grad_norm": row.get(f"mtl/grad_norm/{task}"),
        }
        for task, metric in recipe.metrics.items()
    }
    return {
        "steps": settings.steps,
        "num_processes": num_processes,
        "train_loss": row["train/loss"],
        "tasks": tasks,
        "settings": json.loads(settings.model_dump_json()),
    }


def table(summary: Mapping[str, Any], recipe: Recipe) -> str:
    """The final table: one line per task."""
    lines = [("task", "loss", "metric", "final weight", "grad norm")]
    for task, metric in recipe.metrics.items():
        values = summary["tasks"][task]
        lines.append(
            (
                task,
                _number(values["loss"]),
                f"{metric.name} {_number(values[metric.name])}",
                _number(values["weight"]),
                _number(values["grad_norm"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"

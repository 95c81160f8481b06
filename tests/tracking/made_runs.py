"""Run folders made by formula, for tests of the report that need a shape rather than a training."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any


def write_run(
    folder: Path,
    tasks: Sequence[str],
    steps: int,
    *,
    phase: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> Path:
    """A run of `steps` rows with every key of the contract; `settings=None` leaves no summary."""
    folder.mkdir(parents=True)
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            file.write(json.dumps(made_row(tasks, step, steps, phase)) + "\n")
    if settings is not None:
        engine = {"distributed_type": "DEEPSPEED", "zero_stage": 2, "device": "cpu", "mixed_precision": "no"}
        summary = {"num_processes": 2, "engine": engine, "settings": settings}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def made_row(tasks: Sequence[str], step: int, steps: int, phase: float = 0.0) -> dict[str, float]:
    """Smooth curves with a wobble that differs by task."""
    n, share = len(tasks), step / steps
    row: dict[str, float] = {"train/global_step": step, "train/loss": 3 * math.exp(-2 * share) + 0.1}
    for i, task in enumerate(tasks):
        wobble = 1 + 0.1 * math.sin(1.7 * step + i + phase)
        row[f"mtl/weight/{task}"] = wobble * (1 + i * share) / n
        row[f"mtl/loss/{task}"] = wobble * (i + 1) * math.exp(-3 * share * (1 + i / n))
        row[f"mtl/grad_norm/{task}"] = wobble * 0.02 * (i + 1)
        row[f"mtl/contribution/{task}"] = row[f"mtl/weight/{task}"] * row[f"mtl/grad_norm/{task}"]
    cosines = {
        f"mtl/cosine/{tasks[i]}__{tasks[j]}": round(math.cos(0.9 * (j - i) + 4 * share + phase), 4)
        for i, j in combinations(range(n), 2)
    }
    row |= cosines
    row["mtl/conflict_rate"] = sum(value < 0 for value in cosines.values()) / max(1, len(cosines))
    row["mtl/weight_entropy"] = math.log(n)
    row["perf/step_ms"] = 12.5
    if step % max(1, steps // 5) == 0:
        row |= {f"eval/loss/{task}": 2.0 * row[f"mtl/loss/{task}"] for task in tasks}
        row |= {f"eval/{task}/accuracy": share for task in tasks}
    return row

"""Reads the folder of a run, finished or not, into columns of numbers and settings."""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mtl_dist.tracking.files import METRICS, SUMMARY
from mtl_dist.tracking.jsonl import RowReader, step_of
from mtl_dist.tracking.keys import STEP_KEY, possible

Floats = npt.NDArray[np.float32]
Steps = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RunData:
    """What a report shows about one run.

    Attributes:
        name: name of the folder, with as many parent folders as make it unique.
        steps: `[R]` optimizer steps, strictly increasing.
        columns: key -> `[R]` values; NaN where a row has no value.
        settings: settings in `summary.json`; empty if there is none.
        num_processes: number of processes; None if unknown.
        engine: the engine, in a few words; empty if unknown.
        notes: what a reader of the report must know, one sentence each.
        left_out: those of the notes that tell of values in the file that are not in the columns.
    """

    name: str
    steps: Steps
    columns: dict[str, Floats]
    settings: dict[str, Any]
    num_processes: int | None
    engine: str
    notes: tuple[str, ...]
    left_out: tuple[str, ...] = ()


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """The runs in the given order. A folder that is given twice is read once.

    Raises:
        ValueError: a folder is missing, is not a run, or a line of its metrics is damaged.
    """
    unique = {folder.resolve(): folder for folder in reversed(folders)}
    ordered = list(dict.fromkeys(folder.resolve() for folder in folders))
    for folder in ordered:
        if not folder.is_dir():
            raise ValueError(f"no run folder {str(unique[folder])!r}")
        if not (folder / METRICS).is_file():
            raise ValueError(f"{str(unique[folder])!r} is not a run: it has no {METRICS}")
    return [_read(folder, name) for folder, name in zip(ordered, unique_names(ordered), strict=True)]


def unique_names(folders: Sequence[Path]) -> list[str]:
    """The shortest endings of the paths that are all different."""
    longest = max((len(folder.parts) for folder in folders), default=1)
    for length in range(1, longest + 1):
        names = ["/".join(folder.parts[-length:]).replace("//", "/") for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


@dataclass
class _Columns:
    """Columns that grow row by row. A key that a row does not have is NaN there."""

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: dict[str, array[float]] = field(default_factory=dict)
    not_finite: dict[str, list[float]] = field(default_factory=dict)  # key -> steps
    not_numbers: dict[str, int] = field(default_factory=dict)  # key -> first line
    impossible: dict[str, tuple[int, float]] = field(default_factory=dict)  # key -> first line, value
    without_step: list[int] = field(default_factory=list)  # lines
    limits: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, row: dict[str, Any], line: int) -> None:
        """Appends a row. If the previous row has the same step, the two are merged."""
        step = step_of(row)
        if step is None:
            self.without_step.append(line)
            return
        del row[STEP_KEY]
        if not self.steps or self.steps[-1] != step:
            self.steps.append(step)
        for key, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                self.not_numbers.setdefault(key, line)
                continue
            if (column := self.values.get(key)) is None:
                column, self.limits[key] = self.values.setdefault(key, array("f")), possible(key)
            del column[len(self.steps) - 1 :]
            self._pad(column, len(self.steps) - 1)
            number, (low, high) = math.nan if value is None else _float32(value), self.limits[key]
            if number < low or number > high:
                self.impossible.setdefault(key, (line, number))
                number = math.nan
            elif not math.isfinite(number):
                self.not_finite.setdefault(key, []).append(step)
                number = math.nan
            column.append(number)

    def arrays(self) -> tuple[Steps, dict[str, Floats]]:
        """The columns, sorted by step. Of several rows with the same step, the last one counts."""
        for column in self.values.values():
            self._pad(column, len(self.steps))
        steps = np.array(self.steps, dtype=np.float64)
        columns = {key: np.array(column, dtype=np.float32) for key, column in self.values.items()}
        if np.all(np.diff(steps) > 0):
            return steps, columns
        steps, last = np.unique(steps[::-1], return_index=True)
        return steps, {key: column[::-1][last] for key, column in columns.items()}

    def left_out(self) -> list[str]:
        """What is in the file and in no column, one sentence each."""
        said = []
        if self.without_step:
            number, first = len(self.without_step), self.without_step[0]
            said.append(f"{number} rows without {STEP_KEY}, a whole number >= 0: left out (line {first}).")
        if self.not_numbers:
            names = ", ".join(f"{key} (line {line})" for key, line in sorted(self.not_numbers.items()))
            said.append(f"Not drawn, because not numbers: {names}.")
        for key, (line, value) in self.impossible.items():
            low, high = (round(limit) if math.isfinite(limit) else limit for limit in possible(key))
            said.append(
                f"{key} has values outside [{low}, {high}], which cannot be and are left out: {value:g} in "
                f"line {line}."
            )
        return said

    def _pad(self, column: array[float], length: int) -> None:
        column.extend([math.nan] * (length - len(column)))


def _read(folder: Path, name: str) -> RunData:
    columns, notes = _Columns(), list[str]()
    reader = RowReader(folder / METRICS)
    for row in reader:
        columns.add(row, reader.line)
    if reader.unfinished:
        notes.append("The last row is incomplete, as after a crash, and is left out.")
    steps, values = columns.arrays()
    if not len(steps):
        notes.insert(0, f"{METRICS} has no complete row: there is nothing to draw.")
    left_out = columns.left_out()
    notes += left_out
    for key, where in columns.not_finite.items():
        notes.append(f"{key} was not finite at {len(where)} steps, first at step {where[0]:g}.")
    held = values.get("mtl/held")
    if held is not None:
        notes.append(f"{int(np.nansum(held))} steps were held: their statistics were NaN or infinite.")
    summary = _summary(folder / SUMMARY, notes)
    settings, processes = summary.get("settings"), summary.get("num_processes")
    return RunData(
        name,
        steps,
        values,
        settings if isinstance(settings, dict) else {},
        processes if type(processes) is int else None,
        _engine(summary.get("engine")),
        tuple(notes),
        tuple(left_out),
    )


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        notes.append(f"There is no {SUMMARY}: the run has not finished, or `mtl-dist train` did not make it.")
        return {}
    try:
        summary = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError):
        summary = None
    if not isinstance(summary, dict):
        notes.append(f"{SUMMARY} is damaged: the configuration is not shown.")
        return {}
    return summary


def _engine(described: Any) -> str:
    if not isinstance(described, dict):
        return ""
    kind, stage = described.get("distributed_type"), described.get("zero_stage")
    precision = described.get("mixed_precision")
    parts = ["one process" if kind == "NO" else kind, None if stage is None else f"ZeRO-{stage}"]
    parts += [described.get("device"), None if precision == "no" else precision]
    return ", ".join(str(part) for part in parts if part)


def _float32(value: float) -> float:
    """The value, or infinity if it is too large for float32, the precision of the charts."""
    return float(value) if abs(value) < 3.4e38 else math.inf

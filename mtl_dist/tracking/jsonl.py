"""Rows to a JSON-lines file: one row per optimizer step, whole after a crash, continued after a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mtl_dist.tracking.keys import STEP_KEY as STEP_KEY
from mtl_dist.tracking.rows import Row
from mtl_dist.tracking.tracker import RunInfo, Tracker

_ENCODER = json.JSONEncoder(allow_nan=False)
METRICS_FILE = "metrics.jsonl"  # in a run's output folder


class JsonlWriter:
    """Appends rows to a file and flushes each, so that a killed run leaves every finished row.

    Only the main process may make one. Values that JSON has no word for (infinities) are written as null.

    Args:
        path: the file; its folder is made.
        after_step: optimizer steps that are already done. Rows of later steps, which a resumed run will write
            again, and a last line torn by a crash are removed; 0 starts an empty file.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = read_rows(path) if path.exists() else []
        kept = [row for row in rows if row.get(STEP_KEY, math.inf) <= after_step]
        replacement = path.with_name(path.name + ".tmp")
        replacement.write_text("".join(_line(row) for row in kept), encoding="utf-8")
        replacement.replace(path)  # atomic: a crash here loses nothing
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row and flushes it to the operating system."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonlTracker(Tracker):
    """`metrics.jsonl` in the run's folder: one row per optimizer step. Always on."""

    name = "jsonl"

    def __init__(self) -> None:
        self._writer: JsonlWriter | None = None

    def start(self, run: RunInfo) -> None:
        """Opens the file; rows of later steps than are done go."""
        self._writer = JsonlWriter(run.folder / METRICS_FILE, after_step=run.done)

    def log(self, row: Row) -> None:
        """Appends the row."""
        assert self._writer is not None  # it was started
        self._writer.write(row)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without a last line that a crash left unfinished.

    Raises:
        ValueError: another line is not a JSON object.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):  # text after the last newline is an unfinished row
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON: {line[:80]!r}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: not a row: {line[:80]!r}")
        rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    try:
        return _ENCODER.encode(row) + "\n"
    except ValueError:  # JSON has no word for infinities
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        return _ENCODER.encode(plain) + "\n"

"""Rows in a JSON-lines file: one row per optimizer step. The file survives a crash and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mtl_dist.durable import flush, move
from mtl_dist.tracking.files import METRICS
from mtl_dist.tracking.keys import STEP_KEY
from mtl_dist.tracking.rows import Row
from mtl_dist.tracking.tracker import RunInfo, Tracker

_ENCODER = json.JSONEncoder(allow_nan=False)


class RowReader:
    """Iterates over the rows of a file, one at a time, so that a long run does not have to fit in memory.

    Blank lines are skipped. Text after the last newline is a row that a crash left unfinished: it is skipped.

    Args:
        path: the file.

    Attributes:
        line: number of the line of the last row, from 1.
        unfinished: whether the last row was unfinished; known when the iteration has ended.

    Raises:
        ValueError: during iteration, where a line is not a JSON object in UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.line = 0
        self.unfinished = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, line in self._lines():
            self.line = number
            yield self._row(line, number)

    def up_to(self, step: int) -> Iterator[dict[str, Any]]:
        """The rows up to an optimizer step. What follows them may be broken, as a power cut leaves it."""
        broken: ValueError | None = None
        for number, line in self._lines():
            try:
                row = self._row(line, number)
                if (done := step_of(row)) is None:
                    raise ValueError(f"{self.path}:{number}: no {STEP_KEY} >= 0: {_beginning(line)}")
            except ValueError as error:
                broken = broken or error
                continue
            if done <= step:
                if broken is not None:
                    raise broken
                yield row

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self.unfinished = True
                elif line.strip():
                    yield number, line.rstrip(b"\n")

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets of that depth
            raise ValueError(f"{self.path}:{number}: not JSON: {_beginning(line)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}:{number}: not a row: {_beginning(line)}")
        return row


def step_of(row: Mapping[str, Any]) -> float | None:
    """The optimizer step of a row; None if it has none that can be: a whole number >= 0."""
    step = row.get(STEP_KEY)
    if isinstance(step, bool) or not isinstance(step, int | float):
        return None
    return step if 0 <= step < 2**53 and step == int(step) else None  # no NaN


def _beginning(line: bytes) -> str:
    return repr(line.decode("utf-8", errors="replace")[:80])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, without a last row that a crash left unfinished.

    Raises:
        ValueError: a line is not a JSON object.
    """
    return list(RowReader(path))


class JsonlWriter:
    """Appends rows to a file and flushes each one, so that a killed run keeps every finished row.

    Only the main process may create a writer. JSON cannot express NaN and infinities: they are written as
    null.

    Args:
        path: the file; its folder is created.
        after_step: optimizer steps already done. Rows of later steps are removed, because a resumed run
            writes them again; so is an unfinished last row. 0 starts an empty file.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        replacement = path.with_name(path.name + ".tmp")
        with replacement.open("w", encoding="utf-8") as file:
            for row in RowReader(path).up_to(after_step) if path.exists() else ():
                file.write(_line(row))
        flush(replacement)
        move(replacement, path)  # atomic: a crash here loses nothing
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
        """Opens the file and removes the rows of steps that are not done yet."""
        self._writer = JsonlWriter(run.folder / METRICS, after_step=run.done)

    def log(self, row: Row) -> None:
        """Appends the row."""
        assert self._writer is not None  # `start` was called
        self._writer.write(row)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Closes the file."""
        if self._writer is not None:
            self._writer.close()


def _line(row: Mapping[str, Any]) -> str:
    try:
        return _ENCODER.encode(row) + "\n"
    except ValueError:  # JSON cannot express NaN and infinities
        plain = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        return _ENCODER.encode(plain) + "\n"

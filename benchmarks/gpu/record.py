"""Results of one part of the run: a file that is whole after every check, so that a run can go on."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
Found = dict[str, Any]


class CannotRun(Exception):
    """What a check raises where this machine cannot run it; the text is the reason."""


@contextmanager
def quiet() -> Iterator[None]:
    """Without the library's warnings, many of which a check provokes."""
    logger = logging.getLogger("mtl_dist")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def outcome(check: Callable[[], Found | None]) -> Found:
    """What a check returned or raised, and its seconds."""
    began = time.perf_counter()
    try:
        found: Found = {"outcome": PASSED, **(check() or {})}
    except CannotRun as reason:
        found = {"outcome": SKIPPED, "reason": str(reason)}
    except Exception as error:
        where = traceback.format_exc(limit=-3)[-2000:]
        found = {"outcome": FAILED, "reason": f"{type(error).__name__}: {error}"[:1000], "where": where}
    return {**found, "seconds": round(time.perf_counter() - began, 3)}


class Record:
    """The results of a part by the name of the check. What has an outcome is not run again, unless it failed.

    Threads may share it.

    Args:
        path: of the JSON file.
        rank: only rank 0 writes. All ranks read the same file first, so they run the same checks.
        seconds: after which no further check is begun.
    """

    def __init__(self, path: Path, *, rank: int = 0, seconds: float = float("inf")) -> None:
        self.path = path
        self.rank = rank
        self.until = time.monotonic() + seconds
        self.results: dict[str, Found] = (
            json.loads(path.read_text(encoding="utf-8"))["results"] if path.exists() else {}
        )
        self.facts: Found = {}
        self._lock = threading.Lock()

    def wants(self, name: str) -> bool:
        """Whether there is no result yet, or one that failed."""
        return self.results.get(name, {"outcome": FAILED})["outcome"] == FAILED

    def run(self, name: str, check: Callable[[], Found | None]) -> None:
        """Runs a check that has no result yet, and writes what it returned or raised."""
        if not self.wants(name):
            return
        if time.monotonic() > self.until:
            self.put(name, {"outcome": FAILED, "reason": "not reached within the time of this part"})
            return
        self.put(name, outcome(check))

    def put(self, name: str, found: Found) -> None:
        """Keeps one result, in the file too."""
        with self._lock:
            self.results[name] = found
        self.save()

    def save(self) -> None:
        """Replaces the file by a whole one."""
        if self.rank:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            whole = {"facts": self.facts, "results": self.results}
            unfinished = self.path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
            os.replace(unfinished, self.path)

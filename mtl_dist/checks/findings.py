"""What a checked run found, in plain words: task, rank, step, and what to do."""

from __future__ import annotations

import logging
from dataclasses import dataclass

_LOGGER = logging.getLogger("mtl_dist")


@dataclass(frozen=True)
class Finding:
    """Something that makes the weights of a run worth less than they seem.

    Attributes:
        kind: one word, the same for the same cause.
        task: the task concerned; None where it concerns all tasks.
        rank: the rank that saw it; None where all ranks did.
        step: step of the balancer at which it was first seen.
        text: what it means and what to do.
    """

    kind: str
    task: str | None
    rank: int | None
    step: int
    text: str

    def __str__(self) -> str:
        where = "" if self.rank is None else f", rank {self.rank}"
        whose = "" if self.task is None else f", task {self.task!r}"
        return f"step {self.step}{where}{whose}: {self.text}"


class Findings:
    """Findings, one for each (kind, task); every new one is logged as a warning."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str | None], Finding] = {}

    def add(self, kind: str, task: str | None, rank: int | None, step: int, text: str) -> None:
        """Adds a finding, if it is new."""
        if (kind, task) not in self._found:
            finding = self._found[kind, task] = Finding(kind, task, rank, step, text)
            _LOGGER.warning("mtl_dist found: %s", finding)

    def all(self) -> tuple[Finding, ...]:
        """In the order they were found."""
        return tuple(self._found.values())


class Streaks:
    """How many steps in a row something held, by key."""

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}

    def count(self, key: str, holds: bool) -> int:
        """The length of the streak, this step included; 0 where it does not hold."""
        self._lengths[key] = self._lengths.get(key, 0) + 1 if holds else 0
        return self._lengths[key]

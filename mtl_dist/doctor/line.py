"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        verdict: "ok", "warn" or "FAIL".
        name: name of the check.
        detail: what was found.
        advice: what to change; empty if there is nothing to change.
    """

    verdict: str
    name: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n{'':15}-> {self.advice}" if self.advice else ""
        return f"{self.verdict:<5}{self.name:<10}{self.detail}{advice}"

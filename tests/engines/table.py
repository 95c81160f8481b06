"""The matrix as Markdown."""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Mapping, Sequence

import torch
from cells import ENGINES, Cell
from compare import BFLOAT16, FLOAT32, Verdict

# column of the summary: the cells it counts
COLUMNS: dict[str, Callable[[Cell], bool]] = {
    "fp32": lambda c: (
        c.precision == "fp32" and c.variant == Cell(c.engine, rule=c.rule, probe=c.probe).variant
    ),
    "bf16": lambda c: c.precision == "bf16",
    "accumulation": lambda c: c.accumulation > 1 and not c.held,
    "held weights": lambda c: c.held,
    "checkpoint": lambda c: c.checkpoint == "non-reentrant",
    "reentrant checkpoint": lambda c: c.checkpoint == "reentrant",
    "compiled trunk": lambda c: c.compiled == "trunk",
    "compiled model": lambda c: c.compiled.startswith("model"),
    "lag": lambda c: c.lag != "none",
    "ragged": lambda c: c.data == "ragged",
}
MARKS = {"passed": "✓", "failed": "**FAILED**"}


def markdown(verdicts: Mapping[Cell, Verdict]) -> str:
    """Summary by engine and axis, refusals with their reasons, and every cell."""
    count = {
        kind: sum(v.outcome == kind for v in verdicts.values()) for kind in ("passed", "refused", "failed")
    }
    reasons = list(dict.fromkeys(v.reason for v in verdicts.values() if v.outcome == "refused"))
    counted = ", ".join(f"{number} {kind}" for kind, number in count.items())
    parts = [
        "# The engine matrix",
        f"{len(verdicts)} cells: {counted}. torch {torch.__version__}, {platform.machine()}, CPU and gloo, 2 "
        "processes. Each cell is 10 steps of SGD with momentum; world size and engine are asserted, and "
        "weights and parameters compared with one process on the concatenated batch (float32: "
        f"{FLOAT32:.0e} relative; bf16: {BFLOAT16:.1e} of the way the parameters went, see "
        "tests/engines/compare.py). Made by launch/matrix.sh.",
        summary(verdicts, reasons),
        *([footnotes(reasons)] if reasons else []),
        *([failures(verdicts)] if count["failed"] else []),
        "## Every cell",
        every_cell(verdicts, reasons),
    ]
    return "\n\n".join(parts) + "\n"


def summary(verdicts: Mapping[Cell, Verdict], reasons: Sequence[str]) -> str:
    """Rows are engines, columns axes; an entry counts the cells that passed."""
    engines = [engine for engine in ENGINES if any(cell.engine == engine for cell in verdicts)]
    rows = [["engine", *COLUMNS, "largest error, fp32", "bf16"]]
    for engine in engines:
        mine = {cell: verdict for cell, verdict in verdicts.items() if cell.engine == engine}
        entries = [entry([v for c, v in mine.items() if chosen(c)], reasons) for chosen in COLUMNS.values()]
        rows.append([engine, *entries, *(largest(mine, precision) for precision in ("fp32", "bf16"))])
    return grid(rows)


def entry(verdicts: Sequence[Verdict], reasons: Sequence[str]) -> str:
    passed = sum(v.outcome == "passed" for v in verdicts)
    failed = sum(v.outcome == "failed" for v in verdicts)
    refused = sorted({reasons.index(v.reason) + 1 for v in verdicts if v.outcome == "refused"})
    marks = [f"{passed}" if passed else "", *(f"refused ({r})" for r in refused)]
    marks += [f"**{failed} failed**"] if failed else []
    return ", ".join(mark for mark in marks if mark) or "-"


def largest(verdicts: Mapping[Cell, Verdict], precision: str) -> str:
    errors = [v.error for c, v in verdicts.items() if c.precision == precision and not math.isnan(v.error)]
    return f"{max(errors):.1e}" if errors else "-"


def footnotes(reasons: Sequence[str]) -> str:
    return "\n".join(f"({i}) {reason}\n" for i, reason in enumerate(reasons, 1)).rstrip()


def failures(verdicts: Mapping[Cell, Verdict]) -> str:
    lines = [
        f"* {c.name}: {' '.join(v.reason.split())[:500]}"
        for c, v in verdicts.items()
        if v.outcome == "failed"
    ]
    return "## Failed\n\n" + "\n".join(lines)


def every_cell(verdicts: Mapping[Cell, Verdict], reasons: Sequence[str]) -> str:
    """Rows are variants, columns engines."""
    engines = [engine for engine in ENGINES if any(cell.engine == engine for cell in verdicts)]
    by_variant: dict[str, dict[str, Verdict]] = {}
    for cell, verdict in verdicts.items():
        by_variant.setdefault(cell.variant, {})[cell.engine] = verdict
    rows = [["", *engines]]
    for variant, mine in by_variant.items():
        rows.append([variant, *(mark(mine.get(engine), reasons) for engine in engines)])
    return grid(rows)


def mark(verdict: Verdict | None, reasons: Sequence[str]) -> str:
    if verdict is None:
        return ""
    if verdict.outcome == "refused":
        return f"({reasons.index(verdict.reason) + 1})"
    return MARKS[verdict.outcome]


def grid(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])

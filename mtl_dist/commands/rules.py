"""`mtl-dist rules`: lists the weighting rules: what they read, their paper, their cost, and what they do."""

from __future__ import annotations

import argparse
import inspect
import json
import shutil
import sys
from typing import Any

from mtl_dist.weighting import COMBINATORS, RULES, Rule

_COLUMNS = ("name", "needs", "paper", "cost")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist rules`."""
    parser.add_argument("--json", action="store_true", help="write JSON, with one record per rule")


def run_command(arguments: argparse.Namespace) -> int:
    """Writes the table, one line per rule. In a terminal, lines are cut at its width."""
    if arguments.json:
        sys.stdout.write(json.dumps(rules_records(), indent=1, ensure_ascii=False) + "\n")
        return 0
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    sys.stdout.write(rules_table(width) + "\n")
    return 0


def rules_records() -> list[dict[str, Any]]:
    """One record per rule and combinator: name, class, needs, paper, cost, what it does."""
    records = [_record(name, cls, cls.needs.name.lower()) for name, cls in sorted(RULES.items())]
    return records + [_record(name, cls, "of its rule") for name, cls in sorted(COMBINATORS.items())]


def rules_table(width: int | None = None) -> str:
    """One line per rule, cut at `width` characters if it is given."""
    records = rules_records()
    widths = {column: max(len(column), *(len(r[column]) for r in records)) for column in _COLUMNS}
    header = {column: column for column in _COLUMNS} | {"what": "what it does"}
    lines = (
        "  ".join([*(r[column].ljust(widths[column]) for column in _COLUMNS), r["what"]])
        for r in (header, *records)
    )
    return "\n".join(
        line if width is None or len(line) <= width else line[: width - 1] + "…" for line in lines
    )


def _record(name: str, cls: type[Rule], needs: str) -> dict[str, Any]:
    what = (inspect.getdoc(cls) or "").partition("\n")[0]
    facts = {"paper": cls.paper, "cost": cls.cost}
    return {"name": name, "class": cls.__name__, "needs": needs, **facts, "what": what}

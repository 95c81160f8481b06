"""`mtl-dist rules`: every weighting rule, what it reads, what it does."""

from __future__ import annotations

import argparse
import inspect
import sys

from mtl_dist.weighting import COMBINATORS, RULES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None yet."""


def run_command(arguments: argparse.Namespace) -> int:
    """Writes the table."""
    sys.stdout.write(rules_table() + "\n")
    return 0


def rules_table() -> str:
    """One line per registered rule and combinator: name, what it reads, what it is."""
    lines = [("name", "needs", "what it does")]
    lines += [(name, rule.needs.name.lower(), _first_line(rule)) for name, rule in sorted(RULES.items())]
    lines += [(name, "of its rule", _first_line(rule)) for name, rule in sorted(COMBINATORS.items())]
    widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {needs:<{widths[1]}}  {what}" for name, needs, what in lines)


def _first_line(cls: type) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]

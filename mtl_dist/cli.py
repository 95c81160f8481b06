"""The command `mtl-dist`: `train` runs a recipe, `rules` lists the weighting rules."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence

from mtl_dist.train import add_arguments, run_command
from mtl_dist.weighting import COMBINATORS, RULES


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="mtl-dist", description="Synchronised multi-task loss weighting.")
    commands = parser.add_subparsers(dest="command", required=True)
    add_arguments(commands.add_parser("train", help="train a recipe", description="Train a recipe."))
    commands.add_parser("rules", help="list the weighting rules", description="List the weighting rules.")
    arguments = parser.parse_args(argv)
    if arguments.command == "train":
        return run_command(arguments)
    print(rules_table())
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

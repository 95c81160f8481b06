"""The command `mtl-dist`. `COMMANDS` has one line per sub-command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from mtl_dist import doctor, train
from mtl_dist.commands import dashboard, groups, report, rules

AddArguments = Callable[[argparse.ArgumentParser], None]
RunCommand = Callable[[argparse.Namespace], int]

# name: description, function that adds its arguments, function that runs it and returns the exit status
COMMANDS: dict[str, tuple[str, AddArguments, RunCommand]] = {
    "train": ("train a recipe", train.add_arguments, train.run_command),
    "dashboard": ("create a W&B workspace for the metrics", dashboard.add_arguments, dashboard.run_command),
    "doctor": ("check whether a launch trains correctly", doctor.add_arguments, doctor.run_command),
    "groups": ("find groups of tasks in what runs have recorded", groups.add_arguments, groups.run_command),
    "report": ("write one HTML file for one or several runs", report.add_arguments, report.run_command),
    "rules": ("list the weighting rules", rules.add_arguments, rules.run_command),
}

_PROGRAMS = ("doctor", "train")  # they do more than write


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="mtl-dist", description="Multi-task loss weighting for data-parallel training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (what, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=what, description=what[0].upper() + what[1:] + "."))
    arguments = parser.parse_args(argv)
    if sys.stdout is None:  # closed by the caller; a training writes its results to files too
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    run = COMMANDS[arguments.command][2]
    return run(arguments) if arguments.command in _PROGRAMS else _written(run, arguments)


def _written(run: RunCommand, arguments: argparse.Namespace) -> int:
    """The exit status of a command that only writes text, where its reader may stop reading."""
    try:
        status = run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # such as `| head -1`, which has what it wanted
        _discard_output()
        return 0
    except OSError as error:  # commands tell errors of their own files themselves
        _discard_output()
        sys.stderr.write(f"mtl-dist {arguments.command}: cannot write the output: {error.strerror}\n")
        return 1
    return status


def _discard_output() -> None:
    """What is left in the buffer would fail again when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

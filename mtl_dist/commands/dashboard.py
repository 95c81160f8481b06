"""`mtl-dist dashboard`: creates the W&B workspace for the rows of mtl_dist, in an account or as a file."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mtl_dist.tracking.dashboard import build_workspace, workspace_spec


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist dashboard`."""
    parser.add_argument("--entity", required=True, help="W&B user or team")
    parser.add_argument("--project", required=True, help="W&B project")
    parser.add_argument("--name", default="mtl_dist", help="name of the view")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks to show; default: all tasks of the runs"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the workspace to this file; needs no account"
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Saves the workspace, or writes it to a file. Returns 1 if W&B rejects it, 2 for what else is wrong."""
    try:
        workspace = build_workspace(arguments.entity, arguments.project, arguments.tasks, arguments.name)
    except ValueError as error:
        sys.stderr.write(f"mtl-dist dashboard: {error}\n")
        return 2
    if arguments.json is not None:
        text = json.dumps(workspace_spec(workspace), indent=1) + "\n"
        try:
            arguments.json.write_text(text, encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"mtl-dist dashboard: cannot write {arguments.json}: {error.strerror}\n")
            return 2
        sys.stdout.write(f"wrote {arguments.json}\n")
        return 0
    try:
        workspace.save()
    except Exception as error:  # W&B raises various errors for keys, networks and permissions
        reason = str(error).rstrip(".")
        sys.stderr.write(
            f"mtl-dist dashboard: W&B did not accept the workspace: {reason}. Run `wandb login`, check that "
            "entity and project exist, or write it to a file with --json FILE\n"
        )
        return 1
    sys.stdout.write(f"saved {workspace.url}\n")
    return 0

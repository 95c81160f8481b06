"""`mtl-dist report`: writes one self-contained HTML file for one or several runs."""

from __future__ import annotations

import argparse
import sys

from mtl_dist.tracking.files import METRICS, REPORT
from mtl_dist.tracking.report import write_report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist report`."""
    parser.add_argument("runs", metavar="RUN_DIR", nargs="+", help=f"folder of a run, with {METRICS}")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"default: {REPORT} in the run's folder, or in the current folder for several runs",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Writes the report. If that is not possible, prints one line and returns 2."""
    try:
        path = write_report(arguments.runs, arguments.output)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"mtl-dist report: {error}\n")
        return 2
    sys.stdout.write(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)\n")
    return 0

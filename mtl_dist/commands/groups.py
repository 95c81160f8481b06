"""`mtl-dist groups`: which tasks belong together, from the gradients that runs have recorded."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mtl_dist.grouping import Affinities, Agreement, codelength, find_groups
from mtl_dist.grouping.affinity import Links
from mtl_dist.tracking.files import METRICS
from mtl_dist.tracking.report.groups import affinities_of
from mtl_dist.tracking.report.read import RunData, read_runs

_MATRICES = ("cosines", "conflicts", "affinity")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist groups`."""
    parser.add_argument(
        "runs", metavar="RUN_DIR", nargs="+", help=f"folder of a run, with {METRICS}; several are averaged"
    )
    parser.add_argument(
        "--links",
        choices=get_args(Links),
        default="cosine",
        help="what links tasks: the mean cosine of their gradients, or inter-task affinity to first order",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the search for groups (default: 0)")
    parser.add_argument("--json", action="store_true", help="write JSON, with the matrices")


def run_command(arguments: argparse.Namespace) -> int:
    """Writes groups and means. If that is not possible, prints one line and returns 2."""
    try:
        runs = read_runs([Path(folder) for folder in arguments.runs])
        record, found = groups_record(runs, arguments.links, arguments.seed)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"mtl-dist groups: {error}\n")
        return 2
    for run in runs:
        for sentence in run.left_out:
            sys.stderr.write(f"mtl-dist groups: {run.name}: {sentence}\n")
    if arguments.json:
        matrices = {name: _rows(getattr(found, name)) for name in _MATRICES}
        sys.stdout.write(json.dumps(record | matrices, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    else:
        sys.stdout.write(_text(record, found))
    return 0


def groups_record(runs: Sequence[RunData], links: Links, seed: int) -> tuple[dict[str, Any], Affinities]:
    """What the command tells, and the matrices behind it.

    Raises:
        ValueError: no cosine was recorded.
    """
    found = affinities_of(runs)
    weights = found.links(links)
    groups, bits = find_groups(weights, seed=seed)
    everyone = range(len(found.tasks))
    record = {
        "tasks": list(found.tasks),
        "steps": found.steps,
        "links": links,
        "groups": [[found.tasks[task] for task in group] for group in groups],
        "codelength": bits,
        "codelength_of_one_group": codelength(weights, [everyone]),
        "codelength_of_single_tasks": codelength(weights, [[task] for task in everyone]),
        "inside": _means(found.agreement(groups, inside=True)),
        "between": _means(found.agreement(groups, inside=False)),
    }
    return record, found


def _means(pairs: Agreement) -> dict[str, float | int | None]:
    return {"pairs": pairs.pairs, "cosine": _finite(pairs.cosine), "conflict": _finite(pairs.conflict)}


def _rows(matrix: Any) -> list[list[float | None]]:
    return [[_finite(value) for value in row] for row in matrix.tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _text(record: dict[str, Any], found: Affinities) -> str:
    what = "mean cosine" if record["links"] == "cosine" else "first-order inter-task affinity"
    lines = [f"{len(found.tasks)} tasks, {record['steps']} steps; links: {what}, where it is above 0", ""]
    lines += [f"group {number}: {', '.join(group)}" for number, group in enumerate(record["groups"], 1)]
    lines += [
        "",
        f"codelength {record['codelength']:.4f} bits; of one group {record['codelength_of_one_group']:.4f}, "
        f"of single tasks {record['codelength_of_single_tasks']:.4f}",
    ]
    for where in ("inside", "between"):
        pairs = record[where]
        if pairs["pairs"]:
            lines.append(
                f"{where} groups: {pairs['pairs']} pairs, mean cosine {pairs['cosine']:+.3f}, "
                f"negative in {pairs['conflict']:.0%} of the steps"
            )
    width = max(map(len, found.tasks))
    lines += ["", "mean cosines, in the order of the groups:"]
    order = [found.tasks.index(task) for group in record["groups"] for task in group]
    for i in order:
        cells = ("      ." if i == j else f"{found.cosines[i, j]:+7.3f}" for j in order)
        lines.append(f"  {found.tasks[i]:{width}} {' '.join(cells)}".replace("   +nan", "      ?"))
    lines += [
        "",
        "A negative cosine is no link: groups show who helps whom, cosines who is in conflict.",
    ]
    return "\n".join(lines) + "\n"

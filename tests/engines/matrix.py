"""Launches cells, compares them with one process, and writes the table. Behind launch/matrix.sh.

python tests/engines/matrix.py [--only PATTERN] [-o FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
import warm  # noqa: E402
from cells import FAMILIES, Cell, whole_matrix  # noqa: E402
from compare import Verdict, judge  # noqa: E402
from program import ROOT, run  # noqa: E402

START_LIMIT, CELL_LIMIT = 120.0, 30.0  # seconds: they end a hang, not a slow machine


def train_all(cells: Sequence[Cell], num_processes: int) -> list[list[dict[str, Any]]]:
    """Results by cell and rank of cells of one family. A launch that dies costs the cell it died in."""
    results: list[list[dict[str, Any]]] = []
    while len(results) < len(cells):
        rest = cells[len(results) :]
        done, trouble = launch(rest, num_processes)
        results += done
        if len(done) < len(rest):
            results.append([{"error": trouble, "seconds": 0.0}] * num_processes)
    return results


def launch(cells: Sequence[Cell], num_processes: int) -> tuple[list[list[dict[str, Any]]], str]:
    """One launch of run_cells.py: what it finished, and the end of what it printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cells.json").write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
        limit = START_LIMIT + CELL_LIMIT * len(cells)
        try:
            done = run_script(
                *("run_cells.py", num_processes, folder / "cells.json", folder),
                timeout=limit,
                modules=warm.DEEPSPEED if "deepspeed" in cells[0].family else warm.TORCH,
            )
            trouble = f"the launch ended with {done.returncode}: ...{done.stderr[-2000:]}"
        except AssertionError as hung:
            trouble = str(hung)[-2000:]
        finished = itertools.takewhile(
            lambda ranks: all(rank.exists() for rank in ranks),
            ([folder / f"{i}.{rank}.pt" for rank in range(num_processes)] for i in range(len(cells))),
        )
        return [[torch.load(rank) for rank in ranks] for ranks in finished], trouble


def run_script(
    script: str,
    num_processes: int,
    *arguments: object,
    timeout: float,
    modules: tuple[str, ...] = warm.TORCH,
    torchrun: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder, on ranks that have `modules` imported or with torchrun itself."""
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent / "distributed", ROOT))
    environment = {
        "EXPECTED_WORLD_SIZE": str(num_processes),
        "PYTHONPATH": path,
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_CPU": "false",  # with it Accelerate turns DeepSpeed into DDP; cells ask for the CPU
    }
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
        return run(sys.executable, *launcher, HERE / script, *arguments, timeout=timeout, env=environment)
    return warm.launch(
        HERE / script, num_processes, *arguments, timeout=timeout, env=environment, modules=modules
    )


def judge_all(cells: Iterable[Cell], *, report: bool = False) -> dict[Cell, Verdict]:
    """Trains references and cells, family by family."""
    cells = list(dict.fromkeys(cells))
    references = train_references(cells)
    verdicts: dict[Cell, Verdict] = {}
    for family in ("plain", *FAMILIES):
        group = [cell for cell in cells if cell.family == family]
        if report and group:
            print(f"{family}: {len(group)} cells", file=sys.stderr, flush=True)
        for cell, ranks in zip(group, train_all(group, 1 if family == "plain" else 2), strict=True):
            verdicts[cell] = judge(cell, ranks, references.get(cell.reference()))
            if report and verdicts[cell].outcome == "failed":
                print(f"FAILED {cell.name}: {verdicts[cell].reason}", file=sys.stderr, flush=True)
    return {cell: verdicts[cell] for cell in cells}


def train_references(cells: Iterable[Cell]) -> dict[Cell, dict[str, Any]]:
    """The one-process runs that cells are compared with."""
    wanted = list(dict.fromkeys(cell.reference() for cell in cells))
    results: dict[Cell, dict[str, Any]] = {}
    for family in ("plain", *FAMILIES):
        group = [cell for cell in wanted if cell.family == family]
        for cell, ranks in zip(group, train_all(group, 1), strict=True):
            results[cell] = ranks[0]
    return results


def main() -> None:
    from table import markdown

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="cells whose name matches")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the table goes")
    parser.add_argument("--list", action="store_true", help="names only")
    arguments = parser.parse_args()
    cells = [cell for cell in whole_matrix() if re.search(arguments.only, cell.name)]
    if not cells:
        raise SystemExit(f"error: no cell matches {arguments.only!r}")
    if arguments.list:
        print("\n".join(cell.name for cell in cells))
        return
    verdicts = judge_all(cells, report=True)
    text = markdown(verdicts)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text, encoding="utf-8")
    failed = [cell for cell, verdict in verdicts.items() if verdict.outcome == "failed"]
    raise SystemExit(f"{len(failed)} cells failed" if failed else 0)


if __name__ == "__main__":
    main()

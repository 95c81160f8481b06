"""Part `matrix`: the cells of tests/engines on the GPUs of this machine, each equal to one process.

All GPUs train together over NCCL; a machine with one GPU has a world of one. What fails is tried again
without the library, with a plain sum of the losses: where that fails too, the engine cannot run here, and the
cell is skipped with the engine's error.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.record import FAILED, PASSED, SKIPPED, Found, Record

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
PATHS = (TESTS / "engines", TESTS / "distributed", TESTS, ROOT)
sys.path[:0] = [str(TESTS / "engines"), str(TESTS)]

from cells import FAMILIES, Cell, gpu_matrix  # noqa: E402
from compare import judge  # noqa: E402

START_LIMIT, CELL_LIMIT = 90.0, 20.0  # seconds: they end a hang
NEEDED = {"deepspeed": ("deepspeed",), "accelerate": ("accelerate",)}
NEEDED["accelerate deepspeed"] = ("accelerate", "deepspeed")
BRIEF = (
    Cell("ddp"),
    Cell("ddp", probe="FeatureTap"),
    Cell("ddp", precision="fp16"),
    Cell("ddp", lag="given"),
)
Ranks = list[dict[str, Any]]


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """Every cell that has no result yet, some families at a time. On a CPU two processes meet over Gloo."""
    world_size = torch.cuda.device_count() if device.type == "cuda" else 2
    cells = [cell for cell in (BRIEF if brief else gpu_matrix()) if record.wants(cell.name)]
    wanted: list[tuple[list[Cell], int]] = []
    for family in ("plain", *FAMILIES):
        group = [cell for cell in cells if cell.family == family]
        missing = [name for name in NEEDED.get(family, ()) if importlib.util.find_spec(name) is None]
        if missing:
            for cell in group:
                record.put(
                    cell.name, {"outcome": SKIPPED, "reason": f"{' and '.join(missing)} not installed"}
                )
        elif group:
            wanted.append((group, 1 if family == "plain" else world_size))
    with ThreadPoolExecutor(at_once()) as pool:
        for _ in pool.map(lambda each: _run_family(record, *each, device), wanted):
            pass


def at_once() -> int:
    """How many launches may run at a time: each has some processes that import for seconds."""
    return max(1, min(8, (os.cpu_count() or 1) // 2))


def _run_family(record: Record, cells: list[Cell], world_size: int, device: torch.device) -> None:
    if time.monotonic() > record.until:
        for cell in cells:
            record.put(cell.name, {"outcome": FAILED, "reason": "not reached within the time of this part"})
        return
    references = _references(cells, device, record.until)
    for cell, ranks in zip(cells, _train(cells, world_size, device, record.until), strict=True):
        verdict = judge(cell, ranks, references.get(cell.reference()), world_size)
        found: Found = {"outcome": PASSED if verdict.outcome != "failed" else FAILED}
        found |= {"seconds": round(verdict.seconds, 2), "ranks": world_size}
        if verdict.outcome == "passed":
            found["error"] = verdict.error
        else:
            found |= {"reason": verdict.reason[:1000], "where": ranks[0].get("traceback", "")[-2000:]}
        record.put(cell.name, found)
    failed = [cell for cell in cells if record.results[cell.name]["outcome"] == FAILED]
    _try_without_us(record, failed, world_size, device)


def _try_without_us(record: Record, failed: list[Cell], world_size: int, device: torch.device) -> None:
    controls = list(dict.fromkeys(cell.control() for cell in failed))
    if not controls or time.monotonic() > record.until:
        return
    results = dict(zip(controls, _train(controls, world_size, device, record.until), strict=True))
    for cell in failed:
        errors = [rank["error"] for rank in results[cell.control()] if "error" in rank]
        if errors:
            reason = f"a plain sum of the losses fails likewise: {errors[0][-600:]}"
            record.put(cell.name, {"outcome": SKIPPED, "reason": reason})


def _references(cells: Iterable[Cell], device: torch.device, until: float) -> dict[Cell, dict[str, Any]]:
    """The same trainings in one process, on the same device."""
    wanted = list(dict.fromkeys(cell.reference() for cell in cells))
    found: dict[Cell, dict[str, Any]] = {}
    for family in ("plain", *FAMILIES):
        group = [cell for cell in wanted if cell.family == family]
        if group:
            results = _train(group, 1, device, until)
            found |= {cell: ranks[0] for cell, ranks in zip(group, results, strict=True)}
    return found


def _train(cells: Sequence[Cell], world_size: int, device: torch.device, until: float) -> list[Ranks]:
    """Results by cell and rank. A launch that dies costs the cell it died in."""
    results: list[Ranks] = []
    while len(results) < len(cells):
        rest = cells[len(results) :]
        done, trouble = _launch(rest, world_size, device, until)
        results += done
        if len(done) < len(rest):
            results.append([{"error": trouble, "seconds": 0.0}] * world_size)
            if time.monotonic() > until:
                late = [{"error": "not reached within the time of this part", "seconds": 0.0}] * world_size
                results += [late] * (len(cells) - len(results))
    return results


def _launch(
    cells: Sequence[Cell], world_size: int, device: torch.device, until: float
) -> tuple[list[Ranks], str]:
    """One launch of tests/engines/run_cells.py by torchrun: what it finished, and what it printed last."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cells.json").write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
        script = [str(TESTS / "engines" / "run_cells.py"), str(folder / "cells.json"), name]
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
        limit = min(START_LIMIT + CELL_LIMIT * len(cells), max(until - time.monotonic(), 1.0))
        trouble = ended(
            [sys.executable, *(torchrun if world_size > 1 else []), *script],
            limit,
            {
                "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
                "EXPECTED_WORLD_SIZE": str(world_size),
                "CELLS_DEVICE": device.type,
                "DS_ACCELERATOR": device.type,
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "false",  # with it Accelerate turns DeepSpeed into DDP
            },
        )
        found: list[Ranks] = []
        for i in range(len(cells)):
            paths = [folder / f"{i}.{rank}.pt" for rank in range(world_size)]
            if not all(path.exists() for path in paths):
                break
            found.append([torch.load(path) for path in paths])
        return found, trouble


def ended(command: Sequence[str], limit: float, environment: dict[str, str]) -> str:
    """Runs a command with all that it starts, for `limit` seconds at most; how it ended, and what it said.

    What it finds in PYTHONPATH is the environment's, then what this process finds there.
    """
    path = filter(None, (environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")))
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = f"ended with {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            status = f"had no end after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        out.seek(0)
        return f"the launch {status}: ...{out.read()[-1500:]}"

"""Trains on machines of a `Lab` with torchrun, as a user does on real ones."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from namespaces import ROOT, Lab
from program import CONFIG, environment

from mtl_dist.tracking import read_rows

SETTINGS = ("recipe.num_train=512", "recipe.num_validation=20", "recipe.features=16", "recipe.channels=4")
PORT = 29555


def torchrun(
    lab: Lab,
    place: int,
    log: Path,
    *settings: str,
    options: tuple[str, ...] = (),
    engine: str = "ddp",
    **others: Any,
) -> subprocess.Popen[bytes]:
    """Starts one machine's part of a training."""
    env = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **others.pop("env", {})}
    nodes = () if "--nnodes" in options else ("--nnodes", str(len(lab.names)))
    rendezvous = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"node0:{PORT}", "--rdzv-id", "lab")
    if engine == "ddp":
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *nodes,
            *rendezvous,
            "--nproc-per-node",
            "1",
        ]
    else:
        env |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_CPU": "false"}
        number = len(lab.names)
        launcher = [Path(sys.executable).parent / "accelerate", "launch", "--config_file"]
        launcher += [ROOT / "configs" / "engine" / f"{engine}_cpu.yaml", "--num_processes", number]
        launcher += ["--num_machines", number, "--machine_rank", 1, "--rdzv_backend", "c10d"]
        launcher += ["--main_process_ip", "node0", "--main_process_port", PORT]
    program = [*launcher, *options, "-m", "mtl_dist.train", CONFIG, *SETTINGS, *settings]
    return lab.start(place, *program, env=environment(env), log=log, **others)


def wait(processes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Statuses of processes that must end in time."""
    limit = time.monotonic() + seconds
    return [process.wait(max(0.1, limit - time.monotonic())) for process in processes]


def wait_for_row(folder: Path, step: int, seconds: float = 240) -> None:
    """Returns when the run in `folder` has done `step`."""
    limit = time.monotonic() + seconds
    while last_step(folder) < step:
        assert time.monotonic() < limit, f"step {step} never came; the last one is {last_step(folder)}"
        time.sleep(0.05)


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    return rows[-1]["train/global_step"] if rows else 0


def course(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run, without times."""
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]

"""The parts of the run: what each does, and how long it may take."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu import clients, core, engines, machine, models, syncs, training
from benchmarks.gpu.record import CannotRun, Found, Record

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        about: what it shows.
        seconds: that it may take.
        run: adds its results to a record. The last argument asks for the small form.
        ranks: whether it runs on all GPUs at once.
    """

    about: str
    seconds: float
    run: Callable[[Record, torch.device, bool], None]
    ranks: bool = False


def _doctor(record: Record, device: torch.device, brief: bool) -> None:
    record.run("mtl-dist doctor", _doctor_says)
    if device.type == "cuda":
        record.run("nvidia-smi topo -m", lambda: {"text": _topology()})


def _topology() -> str:
    found = _output(["nvidia-smi", "topo", "-m"], 20)
    return re.sub(r"\x1b\[[0-9;]*m", "", found).split("\nLegend")[0]  # without the codes of terminals


def _doctor_says() -> Found:
    needed = ("accelerate", "pydantic", "yaml")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(f"{', '.join(missing)} not installed, which the training program and doctor need")
    done = _run([sys.executable, "-m", "mtl_dist.doctor"], 25)
    assert "training" in done.stdout, (done.stdout + done.stderr)[-1500:]
    # a copy that is not installed is what this run is for
    lines = [line for line in done.stdout.splitlines() if line.startswith(("ok", "FAIL", "warn"))]
    assert not [line for line in lines if line.startswith("FAIL") and "versions" not in line], done.stdout
    return {"text": "\n".join(line for line in lines if "versions" not in line)}


def _run(command: list[str], limit: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)


def _output(command: list[str], limit: float) -> str:
    done = _run(command, limit)
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    return done.stdout


def _core(record: Record, device: torch.device, brief: bool) -> None:
    core.run(record, device, brief=brief)


def _syncs(record: Record, device: torch.device, brief: bool) -> None:
    syncs.run(record, device, brief=brief)


def _matrix(record: Record, device: torch.device, brief: bool) -> None:
    engines.run(record, device, brief=brief)


def _training(record: Record, device: torch.device, brief: bool) -> None:
    training.run(record, device, brief=brief)


def _models(record: Record, device: torch.device, brief: bool) -> None:
    models.run(record, device, brief=brief)


def _clients(record: Record, device: torch.device, brief: bool) -> None:
    clients.run(record, device, brief=brief)


HEADS = ("linear", "decoder")
SMALL = ("--batch", "4", "--tasks", "2", "--rounds", "1", "--variants", "plain", "lag=1, MGDA")


def _overhead(record: Record, device: torch.device, brief: bool) -> None:
    """benchmarks/overhead.py, one table for each kind of heads."""
    for heads in HEADS[:1] if brief else HEADS:

        def table(heads: str = heads) -> Found:
            out = record.path.parent / f"overhead-{heads}"
            (out / "overhead.md").unlink(missing_ok=True)
            command = [sys.executable, str(ROOT / "benchmarks" / "overhead.py"), "--heads", heads]
            command += [*(SMALL if brief else ("--rounds", "20")), "--out", str(out)]
            return {"text": _output(command, PARTS["overhead"].seconds)}

        record.run(heads, table)


PARTS = {
    "doctor": Part("the machine, and whether a small training goes through", 40, _doctor),
    "core": Part("every rule and probe on the device equals the CPU", 100, _core),
    "syncs": Part("how often a step waits for the device", 60, _syncs),
    "matrix": Part("engines on all GPUs equal one process", 150, _matrix),
    "training": Part("the training program under every engine, as accelerate launches it", 90, _training),
    "clients": Part("real trainers on one GPU, by themselves and with the library", 90, _clients),
    "overhead": Part("the cost of a step beside a plain step, two kinds of heads", 80, _overhead),
    "models": Part("the cost at 10 million to 2.4 billion parameters", 140, _models, ranks=True),
}


def work(name: str, out: Path, seconds: float, *, brief: bool) -> None:
    """Runs a part in this process; with WORLD_SIZE > 1 as one rank of several."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    device = machine.device()
    record = Record(out / f"{name}.json", rank=rank, seconds=seconds)
    record.facts = machine.facts()
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()  # all have read what is there before rank 0 writes
    PARTS[name].run(record, device, brief)
    record.save()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()

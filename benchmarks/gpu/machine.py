"""What the results must name: hardware, driver, torch, NCCL, and the packages that are there."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import facts as host_facts

PACKAGES = ("accelerate", "deepspeed", "transformers", "numpy", "triton", "torchjd", "pydantic")
PACKAGES += ("datasets", "trl", "peft", "sentence-transformers", "lightning", "scipy")  # of clients
PACKAGES += ("torchvision", "ultralytics")


def device() -> torch.device:
    """Where the checks run: the first GPU, or the CPU."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def facts() -> dict[str, Any]:
    """Everything that JSON can hold about this machine."""
    found = {**host_facts(), "platform": platform.platform(), "commit": _commit(), "packages": _packages()}
    if not torch.cuda.is_available():
        return {**found, "gpus": []}
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        **found,
        "gpus": [
            {
                "name": p.name,
                "memory_gib": round(p.total_memory / 2**30, 1),
                "capability": f"{p.major}.{p.minor}",
                "processors": p.multi_processor_count,
            }
            for p in properties
        ],
        "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        "cudnn": torch.backends.cudnn.version(),
        "nccl": _nccl(),
        "driver": _of_nvidia_smi("driver_version"),
        "power_limit": _of_nvidia_smi("power.limit"),
        "persistence": _of_nvidia_smi("persistence_mode"),
    }


def _packages() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return "unknown"


def _nccl() -> str:
    with suppress(Exception):  # a torch that was built without it
        return ".".join(map(str, torch.cuda.nccl.version()))
    return "none"


def _of_nvidia_smi(field: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return ", ".join(dict.fromkeys(done.stdout.split("\n")[:-1]))
    return "unknown"


def wait(where: torch.device) -> None:
    """Until the device has done what it was given."""
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def milliseconds(where: torch.device, work: Any) -> float:
    """Time of one call, with an idle device before and after it."""
    wait(where)
    began = time.perf_counter()
    work()
    wait(where)
    return 1e3 * (time.perf_counter() - began)

"""Part `clients`: the programs of tests/gallery on one GPU.

Each shows what test_gallery.py asks of one process on a CPU.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.engines import ROOT, at_once, ended
from benchmarks.gpu.record import CannotRun, Found, Record, outcome
from tests.gallery.judge import PACKAGES, missing, resumes, trains_as_alone

SCRIPT = ROOT / "tests" / "gallery" / "run.py"
LIMIT = 90.0  # seconds: it ends a hang
BRIEF = ("vqgan", "mmoe")


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """Every client that has no result yet, several at a time where there are cores: most of it is imports."""
    clients = [client for client in (BRIEF if brief else PACKAGES) if record.wants(client)]
    with ThreadPoolExecutor(at_once()) as pool:
        checks = {
            pool.submit(outcome, partial(check, client, device, record.until)): client for client in clients
        }
        for done in as_completed(checks):
            record.put(checks[done], done.result())


def check(client: str, device: torch.device, until: float) -> Found:
    """Trains a client in a process of its own; raises `AssertionError` where its numbers are not right."""
    if absent := missing(client):
        raise CannotRun(f"{' and '.join(absent)} not installed")
    left = until - time.monotonic()
    assert left > 0, "not reached within the time of this part"
    on_gpu = device.type == "cuda"
    environment = {
        "PYTHONPATH": str(ROOT),
        "GALLERY_DEVICE": device.type,
        "DS_ACCELERATOR": device.type,
        "ACCELERATE_USE_CPU": str(not on_gpu).lower(),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / client
        said = ended([sys.executable, str(SCRIPT), client, str(out)], min(LIMIT, left), environment)
        absent = re.findall(r"^ModuleNotFoundError: No module named '(\w+)", said, re.MULTILINE)
        if absent and absent[-1] in PACKAGES[client]:
            raise CannotRun(f"{absent[-1]} cannot be imported")
        status, _, text = said.partition(": ...")
        assert status.endswith("ended with 0"), f"{status}: ...{text[-800:]}"
        facts = torch.load(f"{out}.0", weights_only=True)
    assert facts["gpu_bytes"] > 0 or not on_gpu, "nothing of it was on the GPU"
    return {
        "error": trains_as_alone(facts),
        "resumed": resumes(facts),
        "gpu_mb": round(facts["gpu_bytes"] / 1e6, 1),
    }

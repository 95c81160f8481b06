"""W&B as a user meets it, in one process; started by test_wandb.py with an output folder.

First through Accelerate's own tracker, offline; then our tracker online, without a key and with a server that
is not there. Writes what happened to `facts.json`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from mtl_dist import Balancer
from mtl_dist.integrations.accelerate import attach
from mtl_dist.tracking import JsonlTracker, RunInfo, RunLog, WandbTracker, define_wandb_metrics, step_row
from mtl_dist.weighting import GeometricMean

TASKS = ("a", "b")


def step(balancer: Balancer, k: int) -> None:
    losses = {task: torch.tensor(float(k + i), requires_grad=True) for i, task in enumerate(TASKS, 1)}
    balancer(losses).backward()


def through_accelerate(folder: Path) -> None:
    accelerator = Accelerator(cpu=True, log_with="wandb", project_dir=folder)
    accelerator.init_trackers(
        "mtl-dist", {"lr": 0.1}, {"wandb": {"mode": "offline", "dir": str(folder), "id": "accelerate"}}
    )
    define_wandb_metrics(accelerator.get_tracker("wandb", unwrap=True))
    balancer = attach(Balancer(TASKS, GeometricMean()), accelerator)
    for k in range(1, 4):
        step(balancer, k)
        accelerator.log(step_row(balancer.report, k))
    accelerator.end_training()


def online(folder: Path) -> float:
    """Logs two steps to a W&B that cannot begin; returns the seconds until the first row."""
    start = time.perf_counter()
    balancer = Balancer(TASKS, GeometricMean())
    info = RunInfo(folder, TASKS, {})
    with RunLog([JsonlTracker(), WandbTracker(mode="online", init_timeout=3)], info) as log:
        seconds = time.perf_counter() - start
        for k in (1, 2):
            step(balancer, k)
            log.add(balancer.report)
            log.step(k)
        log.close({})
    return seconds


def main() -> None:
    folder = Path(sys.argv[1])
    through_accelerate(folder / "accelerate")
    print("NO KEY", file=sys.stderr, flush=True)
    facts = {"no_key": online(folder / "no_key")}
    print("NO SERVER", file=sys.stderr, flush=True)
    os.environ["WANDB_API_KEY"] = "0" * 40
    facts["no_server"] = online(folder / "no_server")
    (folder / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()

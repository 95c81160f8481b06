"""Trains on a Ray cluster: one Ray Train worker per GPU, started again where one fails.

    python launch/ray_train.py --workers 8 configs/recipe/multi_digits.yaml output_dir=/shared/runs/digits
    python launch/ray_train.py --workers 2 --cpu CONFIG key=value

Run it on a machine of the cluster, or as `ray job submit -- python launch/ray_train.py ...`. Every machine
needs this repository with its environment at the same path, and `pip install "ray[train]"`. output_dir must
be on a file system that all machines share. The engine is DDP; batch_size is global, and must be divisible by
the number of workers.

If a worker or its machine fails, Ray starts all workers again, on other machines if need be, and the run goes
on from its last whole checkpoint (resume_from=auto, unless you set it). --max-failures says how often
(default: 3).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def work(job: dict[str, Any]) -> None:
    """One worker. Ray has set RANK and its kin, and made the process group; Accelerate finds both."""
    os.chdir(job["cwd"])
    if job["cpu"]:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from mtl_dist.train import main

    status = main(job["arguments"])
    if status:
        raise RuntimeError(f"mtl_dist.train ended with {status}; the worker's log says why")


def main() -> None:
    """Starts the workers and waits for them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, required=True, help="number of processes")
    parser.add_argument("--cpu", action="store_true", help="without GPUs")
    parser.add_argument("--max-failures", type=int, default=3, help="how often to start again (default: 3)")
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    given = parser.parse_args()

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}})
    settings = [given.config, "resume_from=auto", *given.overrides]
    trainer = TorchTrainer(
        work,
        train_loop_config={"arguments": settings, "cpu": given.cpu, "cwd": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=given.workers, use_gpu=not given.cpu),
        torch_config=TorchConfig(backend="gloo" if given.cpu else "nccl"),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=given.max_failures)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()

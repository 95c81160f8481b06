"""What a rank finds and computes: `both_ways.py OUT CASE` writes `OUT.RANK`; started by test_warm.py."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from mtl_dist import Balancer
from mtl_dist.weighting import MGDA

TASKS = ("a", "b")


def weights(rank: int) -> list[list[float]]:
    """Of a few steps on this rank's own data."""
    torch.manual_seed(7)
    trunk, balancer = torch.nn.Linear(3, 2), Balancer(TASKS, MGDA())
    heads = {"a": lambda z: z.square().mean(), "b": lambda z: (z - 1).square().mean()}
    rows = []
    for step in range(3):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(10 * step + rank))
        balancer(trunk(x), heads).backward()
        rows.append([*balancer.report.weights.values(), trunk.weight.grad.sum().item()])
    return rows


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # whole lines in one write: `print` writes text and newline apart, and another rank may write in between
    sys.stdout.write(f"rank {rank} prints\n")
    sys.stderr.write(f"rank {rank} complains\n")
    if sys.argv[2] == "fails" and rank == 1:
        raise KeyError("no such file")
    if sys.argv[2] == "fails":
        dist.barrier()  # for ever: the launcher ends it
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME")
    names += ("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "EXTRA")
    names += ("OMP_NUM_THREADS", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE")
    facts = {
        "world size": dist.get_world_size(),
        "environment": {name: os.environ.get(name) for name in names},
        "arguments": sys.argv[2:],
        "name": __name__,
        "script": __file__,
        "path": sys.path,
        "folder": os.getcwd(),
        "threads": torch.get_num_threads(),
        "other draws on every rank": other_draws(),
        "weights": weights(rank),
    }
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


def other_draws() -> list[bool]:
    """Of Python's, NumPy's and torch's own generators, which nobody seeded."""
    mine = [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002
    everyone: list[list[float]] = [[]] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return [len(set(values)) == len(values) for values in zip(*everyone, strict=True)]


if __name__ == "__main__":
    main()

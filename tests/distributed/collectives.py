"""Counts every collective that Python code issues during balancer steps, and its bytes.

    collectives.py OUT

Rank 0 writes a JSON mapping from case to a list with one entry a step: a list of [name, bytes].
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import start, stop
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, Every, GeometricMean

NAMES = [
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier",
    "broadcast", "broadcast_object_list", "gather", "reduce", "reduce_scatter", "scatter", "send", "recv",
]  # fmt: skip
CALLS: list[list[Any]] = []
TASKS = ["a", "b", "c"]


def spy() -> None:
    for name in NAMES:
        original = getattr(dist, name)

        @functools.wraps(original)
        def counted(*args: Any, original: Any = original, name: str = name, **kwargs: Any) -> Any:
            size = sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
            CALLS.append([name, size])
            return original(*args, **kwargs)

        setattr(dist, name, counted)


class Net(nn.Module):
    def __init__(self, balancer: Balancer, width: int) -> None:
        super().__init__()
        self.balancer, self.trunk = balancer, nn.Linear(4, width)
        self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in TASKS})

    def forward(self, x: torch.Tensor, present: list[str]) -> torch.Tensor:
        heads = {task: (lambda z, task=task: self.heads[task](z).square().mean()) for task in present}
        return self.balancer(self.trunk(x), heads)


def steps(rule: Any, probe: Probe | None, width: int, rank: int, **lag: Any) -> list[list]:
    model = DistributedDataParallel(
        Net(Balancer(TASKS, rule, probe=probe, **lag), width), find_unused_parameters=True
    )
    rows = []
    some = TASKS if rank or lag.get("counts") == "equal" else ["a", "b"]
    # all tasks, one absent here, one absent everywhere, all again
    for present in (TASKS, some, ["a", "c"], TASKS):
        CALLS.clear()
        model(torch.randn(2 + rank, 4), present).backward()
        rows.append(list(CALLS))
    return rows


def main() -> None:
    rank, _ = start()
    spy()
    results = {
        "FeatureProbe": steps(MGDA(), FeatureProbe(), 8, rank),
        "FeatureProbe, wide": steps(MGDA(), FeatureProbe(), 512, rank),
        "FeatureProbe(reevaluate)": steps(MGDA(), FeatureProbe(reevaluate=True), 8, rank),
        "FeatureTap": steps(MGDA(), FeatureTap(), 8, rank),
        "FeatureTap, wide": steps(MGDA(), FeatureTap(), 512, rank),
        "losses": steps(GeometricMean(), None, 8, rank),
        "lag": steps(MGDA(), None, 8, rank, lag=1),
        "lag, losses": steps(GeometricMean(), None, 8, rank, lag=1),
        "lag, equal": steps(MGDA(), None, 8, rank, lag=1, counts="equal"),
        "lag, equal, losses": steps(GeometricMean(), None, 8, rank, lag=1, counts="equal"),
        "Every(2)": steps(Every(MGDA(), 2), None, 8, rank),
    }
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main()

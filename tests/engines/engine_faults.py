"""Rank 1 fails under an engine, in a head or outside of the balancer.

engine_faults.py heads OUT       its last head raises, under one engine after the other; each rank writes
                                 `OUT.RANK`, a JSON mapping from engine to [error type, message]
engine_faults.py before ENGINE   it raises before its second forward, under one engine, and ends
engine_faults.py head ENGINE     its first head raises, under one engine, and it ends
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

from adapters import Engine, build
from cells import Cell
from ranks import start, stop
from torch import Tensor
from toy import TASKS, Batch, Net, global_batch, shard

from mtl_dist import Balancer
from mtl_dist.weighting import MGDA

HEALED = ("ddp", "zero-0", "zero-1", "zero-2")  # no collective of theirs between the heads and ours


class Failing(Net):
    """Its `task` raises on rank 1."""

    task, rank = "vector", 0

    def losses(self, batch: Batch) -> dict:
        losses = super().losses(batch)
        working = losses[self.task]

        def head(z: Tensor) -> Tensor:
            loss = working(z)
            if self.rank == 1:
                raise KeyError("no such label")
            return loss

        return {**losses, self.task: head}


def prepare(name: str, rank: int, task: str = "vector") -> Engine:
    cell = Cell(name)
    balancer = Balancer(TASKS, MGDA())
    net = Failing(balancer, cell)
    net.task, net.rank = task, rank
    return build(net, balancer, cell)


def step(engine: Engine, rank: int, number: int) -> None:
    engine.step([shard(global_batch(number, 0, "even"), rank, 2, "even")], lambda: None)


def main() -> None:
    where, what = sys.argv[1:]
    rank, _ = start()
    if where == "heads":
        raised = {}
        for name in HEALED:
            try:
                step(prepare(name, rank), rank, 0)
            except Exception as error:
                raised[name] = [type(error).__name__, str(error)]
            gc.collect()
        Path(f"{what}.{rank}").write_text(json.dumps(raised))
        stop()
        return
    healthy = where == "before"
    engine = prepare(what, 0 if healthy else rank, "number")
    if healthy:
        step(engine, rank, 0)
        if rank == 1:
            raise KeyError("no such file")
    step(engine, rank, 1)


if __name__ == "__main__":
    main()

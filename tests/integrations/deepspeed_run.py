"""A few steps under plain DeepSpeed, saved and resumed; started by test_deepspeed_checkpoints.py.

    deepspeed_run.py OUT

Each rank writes `OUT.RANK`: what it ran on, and weights of every step, resumed or not.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from problem import TASKS, Net, global_batch, shard

from mtl_dist import Balancer
from mtl_dist.integrations.deepspeed import attach, load_checkpoint, save_checkpoint
from mtl_dist.weighting import MGDA, Smooth

CONFIG = {"train_micro_batch_size_per_gpu": 12, "zero_optimization": {"stage": 1}}
CONFIG |= {"zero_allow_untested_optimizer": True}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    net = Net(Balancer(TASKS, Smooth(MGDA(), 0.5)))
    engine, *_ = deepspeed.initialize(
        model=net, optimizer=torch.optim.Adam(net.parameters(), lr=0.01), config=CONFIG
    )
    attach(net.balancer, engine)

    def run(steps: range) -> list:
        rows = []
        for step in steps:
            engine.backward(engine(shard(global_batch(step, "even"), rank, world_size, "even")))
            engine.step()
            rows.append([net.balancer.report.weights, net.balancer.report.losses])
        return rows

    rows = run(range(3))
    save_checkpoint(net.balancer, engine, sys.argv[1], client_state={"mine": 1})
    rows += run(range(3, 6))
    path, client = load_checkpoint(net.balancer, engine, sys.argv[1])
    report = net.balancer.report.weights
    resumed = run(range(3, 6))
    try:
        load_checkpoint(net.balancer, engine, sys.argv[1], name="other")
        refusal = "loaded"
    except FileNotFoundError as error:
        refusal = str(error)
    facts = {
        "world_size": world_size,
        "zero": engine.zero_optimization_stage(),
        "path": Path(path).parent.name,
        "client": client["mine"],
        "rows": rows,
        "report": report,
        "resumed": resumed,
        "refusal": refusal,
    }
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(facts))
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

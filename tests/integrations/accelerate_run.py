"""A few accumulated steps under Accelerate, saved and resumed; started by test_accelerate.py.

    accelerate_run.py OUT PROBE

Each rank writes `OUT.RANK`: what it ran on, weights of every step, and whether the resumed run is the same.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.integrations.accelerate import attach
from mtl_dist.weighting import MGDA, Smooth

PROBES = {"FeatureProbe": FeatureProbe(), "FeatureTap": FeatureTap()}
TASKS = ("a", "b", "c")


class Net(nn.Module):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.balancer, self.trunk = balancer, nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x).tanh()
        return self.balancer(z, {t: (lambda z, t=t: (self.heads[t](z) - 1).square().mean()) for t in TASKS})


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def run(
    net: nn.Module, balancer: Balancer, optimizer: object, accelerator: Accelerator, steps: range
) -> list:
    rows = []
    for step in steps:
        with accelerator.accumulate(net):
            accelerator.backward(net(batch(step, accelerator.process_index)))
            report = balancer.report
            rows.append([report.weights, report.grad_norms, report.losses])
            optimizer.step()
            optimizer.zero_grad()
    return rows


def build(probe: str, accelerator: Accelerator) -> tuple:
    set_seed(0)
    balancer = attach(Balancer(TASKS, Smooth(MGDA(), 0.5), probe=PROBES[probe]), accelerator)
    net = Net(balancer)
    return *accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1)), balancer


def main() -> None:
    out, probe = sys.argv[1:]
    accelerator = Accelerator(gradient_accumulation_steps=2)
    net, optimizer, balancer = build(probe, accelerator)
    rows = run(net, balancer, optimizer, accelerator, range(4))
    accelerator.save_state(f"{out}.state")
    rows += run(net, balancer, optimizer, accelerator, range(4, 8))
    accelerator.load_state(f"{out}.state")
    resumed = run(net, balancer, optimizer, accelerator, range(4, 8))
    facts = {
        "world_size": accelerator.num_processes,
        "type": accelerator.distributed_type.value,
        "ddp": isinstance(net, DistributedDataParallel),
        "step": balancer.step,
        "rows": rows,
        "resumed": resumed,
    }
    Path(f"{out}.{accelerator.process_index}").write_text(json.dumps(facts))
    del net, optimizer
    accelerator.free_memory()
    gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
    accelerator.end_training()


if __name__ == "__main__":
    main()

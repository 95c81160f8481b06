"""Trains on real ranks under DDP, or on as many virtual ranks in one process; rank 0 writes the trajectory.

    virtual_run.py OUT VIRTUAL_RANKS

Dropout in a head and batch statistics in the trunk make every rank's random state and buffers matter.
"""

from __future__ import annotations

import sys

import torch
from equivalence import PROBES
from problem import Net, global_batch, shard
from ranks import start, stop
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import FAMO, MGDA, RLW

RULES = {"mgda": MGDA(), "famo": FAMO(), "rlw": RLW(seed=1)}
CELLS = [
    (rule, probe, scenario)
    for rule in RULES
    for probe in ("FeatureProbe", "FeatureProbe(reevaluate)", "FeatureTap")
    for scenario in ("ragged", "nothing on one rank")
]
STEPS = 8


def build(rule: str, probe: str, scenario: str) -> Net:
    torch.manual_seed(7)
    net = Net(Balancer(("task0", "task1", "task2"), RULES[rule], probe=PROBES[probe]))
    if scenario != "ragged":  # one rank has one sample there, which has no batch statistics
        net.trunk.append(nn.BatchNorm1d(8))
    net.heads[2].insert(1, nn.Dropout(0.3))
    return net


def train(rule: str, probe: str, scenario: str, number: int) -> dict:
    net = build(rule, probe, scenario)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    virtual = VirtualRanks(number, net.balancer, net) if number > 1 else None
    model = net if virtual else DistributedDataParallel(net, find_unused_parameters=True)
    weights = []
    for step in range(STEPS):
        batch = global_batch(step, scenario)
        optimizer.zero_grad()
        if virtual is None:
            model(shard(batch, RANK, WORLD_SIZE, scenario)).backward()
        else:
            virtual.run(lambda rank, batch=batch: backward(net, shard(batch, rank, number, scenario), number))
        optimizer.step()
        weights.append(net.balancer.report.weight_vector.clone())
    return {"weights": torch.stack(weights), "model": {k: v.clone() for k, v in net.state_dict().items()}}


def backward(net: Net, batch: object, number: int) -> torch.Tensor:
    loss = net(batch)
    (loss / number).backward()
    return loss


def main() -> None:
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = start()
    out, number = sys.argv[1], int(sys.argv[2])
    assert (number > 1) == (WORLD_SIZE == 1)
    results = {cell: train(*cell, number) for cell in CELLS}
    if RANK == 0:
        torch.save(results, out)
    stop()


if __name__ == "__main__":
    main()

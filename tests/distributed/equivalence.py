"""Trains rules with every probe in every scenario under DDP; rank 0 writes the trajectories to a file.

    equivalence.py OUT NUM_STEPS DTYPE CELLS

CELLS is `kinds` (one rule of each kind, every probe, every scenario), `rules` (every rule, before and in the
backward, even shards), `lag` (the kinds with lag=1; and even shards with equal counts), or `all`.
"""

from __future__ import annotations

import itertools
import sys

import torch
from problem import SCENARIOS, TASKS, Net, global_batch, shard
from ranks import start, stop
from subjects import build
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import RULES, Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe

PROBES = {
    "FeatureProbe": FeatureProbe(),
    "FeatureProbe(reevaluate)": FeatureProbe(reevaluate=True),
    "FeatureTap": FeatureTap(),
    "SharedLayerProbe": SharedLayerProbe(),
    "ParameterProbe": ParameterProbe(bucket=50),
}
# nothing, losses, losses with memory, norms, Gram
KINDS = ("equal", "geometric_mean", "initial_loss", "inverse_grad_norm", "mgda")


def train(rule: str, probe: str, scenario: str, lag: str, num_steps: int, dtype: torch.dtype) -> list[dict]:
    torch.manual_seed(7)
    lagged = {"lag": 1, "counts": lag} if lag else {}
    balancer = Balancer(TASKS, build(rule, TASKS), probe=PROBES[probe], **lagged)
    net = Net(balancer).to(dtype)
    model = net
    if WORLD_SIZE > 1:
        model = DistributedDataParallel(net, find_unused_parameters=scenario != "even")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0003)
    rows = []
    for step in range(num_steps):
        optimizer.zero_grad()
        model(shard(global_batch(step, scenario, dtype), RANK, WORLD_SIZE, scenario)).backward()
        rows.append(row(balancer, net, step))
        optimizer.step()
    assert balancer._synchronizer.world_size == WORLD_SIZE
    return rows


def row(balancer: Balancer, net: Net, step: int) -> dict:
    """Everything that must not depend on the number of ranks."""
    report = balancer.report
    assert report is not None
    assert report.step == step
    stats = report.stats
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in net.named_parameters()
    }
    return {
        "losses": stats.losses * stats.present,
        "gram": stats.gram,
        "weights": report.weight_vector,
        "gradients": gradients,
    }


def check_agreement(results: dict) -> None:
    """All ranks hold bitwise the same weights."""
    if WORLD_SIZE > 1:
        mine = torch.stack([row["weights"] for rows in results.values() for row in rows])
        everyone = [torch.empty_like(mine) for _ in range(WORLD_SIZE)]
        torch.distributed.all_gather(everyone, mine)
        assert all(torch.equal(everyone[0], other) for other in everyone), "weights differ between ranks"


def cells(which: str) -> list[tuple[str, str, str, str]]:
    """(rule, probe, scenario, counts with lag) of every training."""
    if which == "rules":  # what a rule is given does not depend on the probe, but for where it decides
        return list(itertools.product(sorted(RULES), ("FeatureProbe", "FeatureTap"), SCENARIOS[:1], [""]))
    if which == "lag":
        probes = [probe for probe in PROBES if "reevaluate" not in probe]
        given = list(itertools.product(KINDS[1:], probes, SCENARIOS, ["given"]))
        return given + list(itertools.product(KINDS[1:], probes, SCENARIOS[:1], ["equal"]))
    return list(itertools.product(KINDS if which == "kinds" else sorted(RULES), PROBES, SCENARIOS, [""]))


def main() -> None:
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = start()
    out, num_steps, dtype, which = sys.argv[1:]
    results = {cell: train(*cell, int(num_steps), getattr(torch, dtype)) for cell in cells(which)}
    check_agreement(results)
    if RANK == 0:
        torch.save(results, out)
    stop()


if __name__ == "__main__":
    main()

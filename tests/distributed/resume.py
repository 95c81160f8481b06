"""Training on another number of ranks than the checkpoint was written on.

    resume.py FOLDER FROM...

Trains every rule and writes a checkpoint of each into `FOLDER/<world size>` after SAVED steps; then goes on
from the checkpoints of each world size FROM. The weights after SAVED go to `FOLDER/<world size>.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from problem import TASKS, Net, global_batch, shard
from ranks import start, stop
from subjects import build
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, checkpoint

# memory of losses, of weights, of gradients, random draws, learned weights
RULES = (
    "dwa(interval=1)",
    "smooth/mgda",
    "every/inverse_grad_norm",
    "relobralo",
    "pcgrad",
    "grad_norm",
    "famo",
)
SAVED, STEPS = 4, 10


def run(rule: str, folder: Path, source: str | None) -> torch.Tensor:
    """Weights after step SAVED, `[STEPS - SAVED, n]`."""
    torch.manual_seed(7)
    net = Net(Balancer(TASKS, build(rule, TASKS))).double()
    file = folder / f"{rule.replace('/', '-')}.model"
    if source is not None:
        file = folder.parent / source / file.name
        net.load_state_dict(torch.load(file))
        checkpoint.load(net.balancer, file.parent, name(rule))
    model = DistributedDataParallel(net) if WORLD_SIZE > 1 else net
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
    weights = []
    for step in range(0 if source is None else SAVED, STEPS):
        if step == SAVED and source is None and RANK == 0:
            checkpoint.save(net.balancer, folder, name(rule))
            torch.save(net.state_dict(), file)
        optimizer.zero_grad()
        model(shard(global_batch(step, "ragged", torch.float64), RANK, WORLD_SIZE, "ragged")).backward()
        optimizer.step()
        weights.append(net.balancer.report.weight_vector)
    assert net.balancer.step == STEPS
    return torch.stack(weights[-(STEPS - SAVED) :])


def name(rule: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in rule)


def main() -> None:
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = start()
    folder = Path(sys.argv[1])
    sources: list[str | None] = [None, *sys.argv[2:]]
    results = {}
    for source in sources:
        for rule in RULES:
            results[source, rule] = run(rule, folder / str(WORLD_SIZE), source)
        if WORLD_SIZE > 1:
            torch.distributed.barrier()  # rank 0 has written
    if RANK == 0:
        torch.save(results, folder / f"{WORLD_SIZE}.pt")
    stop()


if __name__ == "__main__":
    main()

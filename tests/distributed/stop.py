"""A signal to one rank stops all ranks after the same step, and reduces nothing more.

stop.py CASE RANK    prints where each rank stopped; RANK gets the signal (-1: none) in step SIGNAL
"""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist
from problem import TASKS, Net, global_batch, shard
from ranks import start, stop
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureTap
from mtl_dist.integrations.stop import SaveOnSignal
from mtl_dist.weighting import MGDA

CASES = {"probe": {}, "tap": {"probe": FeatureTap()}, "check": {"check": True}, "window": {"window": 2}}
SIGNAL, STEPS = 3, 8


def main() -> None:
    rank, world_size = start()
    case, receiver = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(7)
    net = Net(Balancer(TASKS, MGDA(), **CASES[case])).double()
    model = DistributedDataParallel(net) if world_size > 1 else net
    asked = []
    with SaveOnSignal(net.balancer) as request:
        for step in range(1, STEPS + 1):
            if step == SIGNAL and rank == receiver:
                os.kill(os.getpid(), signal.SIGUSR1 if case == "probe" else signal.SIGTERM)
            batch = shard(global_batch(step, "even", torch.float64), rank, world_size, "even")
            model(batch).backward()
            if request.requested():
                asked.append(step)
                break
    name = request.signal
    said: list[str] = [""] * world_size
    line = f"{rank} {asked[0] if asked else None} {name} {request.exit_status}"
    dist.all_gather_object(said, line)  # the ranks share a file, in which their lines may mix
    if rank == 0:
        sys.stdout.write("\n".join(said) + "\n")
        sys.stdout.flush()
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL, "the handlers stay"
    stop()


if __name__ == "__main__":
    main()

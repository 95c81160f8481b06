"""Trains every rule on ranks that share neither seed nor data; each rank writes what it saw.

    agreement.py OUT

Each rank writes `OUT.RANK`: by subject, `weights` [STEPS, n], the rank's own `losses` [STEPS, n] (0 where a
task is absent on it) and the rule's final `state`. `PLANTED` stands for a rule that draws from the process's
own generator, so that the comparison can be seen to fail.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

import numpy as np
import torch
from problem import TASKS, Batch, Net
from ranks import start, stop
from subjects import VARIANTS, build
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import RULES, Balancer, FeatureProbe
from mtl_dist.weighting import Rule

STEPS = 30
PLANTED = "draws from the process's own generator"
# all rules, other settings that draw or observe, and the planted fault
SUBJECTS = (*RULES, "relobralo(beta=0.5)", "famo(feedback=after)", PLANTED)
assert set(SUBJECTS) <= {*RULES, *VARIANTS, PLANTED}


@dataclass(frozen=True)
class OwnDraws(Rule):
    """RLW as it is usually written."""

    def update(self, stats, state):
        return torch.randn_like(stats.losses).softmax(0), state


def train(rule: Rule, rank: int) -> dict[str, object]:
    """STEPS steps from this rank's own seed, in all three generators that a rule might draw from."""
    seed = 17 + 1000 * rank
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - it is the global state that must not matter
    balancer = Balancer(TASKS, rule, probe=FeatureProbe())
    net = Net(balancer)  # other parameters on each rank, until DDP takes those of rank 0
    model = DistributedDataParallel(net, find_unused_parameters=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=3e-4)
    weights, losses = [], []
    for _ in range(STEPS):
        batch = local_batch(rank)
        losses.append(own_losses(net, batch))
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
        weights.append(balancer.report.weight_vector.clone())
        if rule.observes:
            balancer.observe(present(own_losses(net, batch), batch), counts=batch.counts())
    return {"weights": torch.stack(weights), "losses": torch.stack(losses), "state": balancer.state_dict()}


def local_batch(rank: int) -> Batch:
    """Of 5 samples on rank 0, more on others; each label is missing in every third sample."""
    size = 5 + 4 * rank
    owned = torch.rand(size, len(TASKS)) < 2 / 3
    return Batch(torch.randn(size, 6), torch.randn(size), torch.randint(0, 4, (size,)), owned, counted=True)


@torch.no_grad()
def own_losses(net: Net, batch: Batch) -> Tensor:
    """`[n]`, of this rank's samples; 0 where a task has none."""
    z = net.trunk(batch.inputs)
    values = [net._head(i, batch)(z) for i in range(len(TASKS))]
    return torch.stack([torch.zeros(()) if value is None else value for value in values])


def present(losses: Tensor, batch: Batch) -> dict[str, Tensor]:
    return {
        task: loss for task, loss, any_own in zip(TASKS, losses, batch.owned.any(0), strict=True) if any_own
    }


def main() -> None:
    rank, _ = start()
    seen = {name: train(OwnDraws() if name == PLANTED else build(name, TASKS), rank) for name in SUBJECTS}
    torch.save(seen, f"{sys.argv[1]}.{rank}")
    stop()


if __name__ == "__main__":
    main()

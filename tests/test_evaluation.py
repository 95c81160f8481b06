"""Each task's loss in an evaluation: sums over batches, and over ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_dist import Balancer, collect_evaluation
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import Equal
from tests.faults.small import batch, net


def test_sums_weigh_batches_by_their_counts_and_rank_by_rank() -> None:
    """Two ranks of different numbers of batches, one of them without a task, are one data set."""
    model = net()
    x = batch(3, 12)
    heads = {t: (lambda z, t=t: model.losses(z)[t]) for t in "ab"}

    def evaluate(parts: list[Tensor]) -> Tensor:
        for part in parts:
            z = model.trunk(part).tanh()
            only = {"a": heads["a"]} if len(part) == 1 else heads
            model.balancer(z, only, counts=dict.fromkeys(only, len(part)))
        return z.sum()

    ranks = VirtualRanks(2, model.balancer, model)
    model.eval()
    with torch.no_grad(), collect_evaluation(model.balancer) as sums:
        ranks.run(lambda rank: evaluate([x[:4], x[4:11]] if rank == 0 else [x[11:]]))
    with torch.no_grad():
        a = model.losses(model.trunk(x).tanh())["a"]
        b = model.losses(model.trunk(x[:11]).tanh())["b"]
    assert sums.losses() == pytest.approx({"a": a.item(), "b": b.item()}, rel=1e-6)
    assert sums.calls == 3
    model(x)
    assert sums.calls == 3, "collected after the end"
    with collect_evaluation(model.balancer) as nothing:
        model.train()
    assert nothing.losses() == {}


def test_many_samples_are_counted_to_the_last_one() -> None:
    """A float32 sum of counts stops at 2^24."""
    balancer = Balancer(["a", "b"], Equal()).eval()
    with collect_evaluation(balancer) as sums:
        for count in (2**24, 1):
            balancer({"a": torch.tensor(float(count == 1))}, counts={"a": count})
    assert sums.losses() == pytest.approx({"a": 1 / (2**24 + 1)}, rel=1e-12, abs=0)
    assert sums.calls == 2

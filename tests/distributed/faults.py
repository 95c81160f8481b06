"""Plants a fault on one rank, one case after the other; every rank prints what it raised.

    faults.py OUT

Each rank writes `OUT.RANK`: a JSON mapping from case to [error type, message], or to null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from ranks import start, stop
from torch import Tensor

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.weighting import MGDA, Equal, GeometricMean, Smooth


def features() -> Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True) * 1


def heads(**others: Callable) -> dict[str, Callable]:
    return {"a": lambda z: z.sum(), "b": lambda z: z.square().sum(), **others}


def different_tasks(rank: int) -> None:
    tasks = ["a", "b"] if rank == 0 else ["b", "a"]
    Balancer(tasks, MGDA())(features(), heads())


def different_rules(rank: int) -> None:
    Balancer(["a", "b"], Smooth(Equal(), 0.9 if rank == 0 else 0.5))(features(), heads())


def different_probes(rank: int) -> None:
    Balancer(["a", "b"], MGDA(), probe=FeatureProbe() if rank == 0 else FeatureTap())(features(), heads())


def unknown_task(rank: int) -> None:
    extra = {"c": lambda z: z.sum()} if rank == 1 else {}
    Balancer(["a", "b"], MGDA())(features(), heads(**extra))


def loss_of_wrong_shape(rank: int) -> None:
    Balancer(["a", "b"], MGDA())(features(), heads(b=(lambda z: z) if rank == 1 else (lambda z: z.sum())))


def head_raises(rank: int) -> None:
    def head(z: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("no such label")
        return z.sum()

    Balancer(["a", "b"], MGDA())(features(), heads(b=head))


def head_raises_under_the_tap(rank: int) -> None:
    def head(z: Tensor) -> Tensor:
        if rank == 1:
            raise KeyError("no such label")
        return z.sum()

    Balancer(["a", "b"], MGDA(), probe=FeatureTap())(features(), heads(b=head)).backward()


def features_missing(rank: int) -> None:
    z = features() if rank == 0 else None
    Balancer(["a", "b"], MGDA())(z, heads())


def nan_loss(rank: int) -> None:
    factor = torch.nan if rank == 1 else 1.0
    Balancer(["a", "b"], MGDA())(features(), heads(b=lambda z: factor * z.sum()))


def infinite_gradient_under_the_tap(rank: int) -> None:
    def head(z: Tensor) -> Tensor:
        return (z - z.detach()).sqrt().sum() if rank == 1 else z.sum()

    Balancer(["a", "b"], MGDA(), probe=FeatureTap())(features(), heads(b=head)).backward()


def negative_mean_of_positive_and_negative(rank: int) -> None:
    """The global loss counts: rank 0 alone would see nothing wrong."""
    value = torch.tensor(1.0 if rank == 0 else -3.0)
    Balancer(["a", "b"], GeometricMean())({"a": torch.tensor(1.0), "b": value})


def positive_mean_of_positive_and_negative(rank: int) -> None:
    value = torch.tensor(3.0 if rank == 0 else -1.0)
    Balancer(["a", "b"], GeometricMean())({"a": torch.tensor(1.0), "b": value})


def group_changed_too_late(rank: int) -> None:
    balancer = Balancer(["a", "b"], MGDA())
    balancer(features(), heads())
    balancer.set_group(None)


def told_again_on_one_rank(rank: int) -> None:
    """Rank 1 goes on after an exception that the others did not have."""
    balancer = Balancer(["a", "b"], MGDA(), lag=1)
    for _ in range(1 + rank):
        balancer.expect({"a": 1, "b": 1})
    for _ in range(2):
        balancer(features(), heads()).backward()


CASES = [
    different_tasks,
    different_rules,
    different_probes,
    unknown_task,
    loss_of_wrong_shape,
    head_raises,
    head_raises_under_the_tap,
    features_missing,
    nan_loss,
    infinite_gradient_under_the_tap,
    negative_mean_of_positive_and_negative,
    positive_mean_of_positive_and_negative,
    group_changed_too_late,
    told_again_on_one_rank,
]


def main() -> None:
    rank, _ = start()
    results = {}
    for case in CASES:
        try:
            case(rank)
        except Exception as error:
            results[case.__name__] = [type(error).__name__, str(error)]
        else:
            results[case.__name__] = None
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main()

"""Context parallelism crossed with data parallelism: 2 data ranks x 2 context ranks, which share sequences.

    context.py OUT

Every rank holds half of the tokens of its sequences, and attention gathers keys and values. Rank 0 writes
`OUT`: for each case what one process gives with whole sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start, stop
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.nn.functional import all_reduce

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.weighting import MGDA, GradNorm, InverseLoss, TokenShare

STEPS = 3
SEQUENCES, TOKENS, WIDTH = 3, 8, 6  # sequences of one data rank
TASKS = ("next", "value")


@dataclass(frozen=True)
class Ranks:
    """Where this process is: its data rank (None: it has all data), and its half of each sequence."""

    data: int | None = None
    half: int | None = None
    context: dist.ProcessGroup | None = None

    def own(self, values: Tensor) -> Tensor:
        """The tokens of this rank."""
        return values if self.half is None else values.chunk(2, dim=1)[self.half]


@dataclass(frozen=True)
class Case:
    """A balancer, and the form of the losses: "losses", "heads", "tokens" (task ids) or "whole" sequences."""

    make: Callable[[dist.ProcessGroup | None], Balancer]
    form: str = "heads"


CASES = {
    "losses": Case(lambda group: Balancer(TASKS, InverseLoss(), group=group), "losses"),
    "losses, lag": Case(lambda group: Balancer(TASKS, InverseLoss(), group=group, lag=1), "losses"),
    "FeatureProbe": Case(lambda group: Balancer(TASKS, MGDA(), group=group, probe=FeatureProbe())),
    "FeatureProbe, lag": Case(lambda group: Balancer(TASKS, GradNorm(), group=group, lag=1)),
    "FeatureTap": Case(lambda group: Balancer(TASKS, MGDA(), group=group, probe=FeatureTap())),
    "ParameterProbe": Case(lambda group: Balancer(TASKS, MGDA(), group=group, probe=ParameterProbe(every=1))),
    "parameters=": Case(
        lambda group: Balancer(TASKS, MGDA(), group=group, probe=ParameterProbe()), "losses, parameters"
    ),
    "task ids": Case(lambda group: Balancer(TASKS, TokenShare(), group=group), "tokens"),
    "task ids, lag": Case(lambda group: Balancer(TASKS, InverseLoss(), group=group, lag=1), "tokens"),
    "task ids, SharedLayerProbe": Case(
        lambda group: Balancer(TASKS, MGDA(), group=group, probe=SharedLayerProbe()), "tokens"
    ),
    "whole sequences": Case(lambda group: Balancer(TASKS, MGDA(), group=group), "whole"),
}


class Net(nn.Module):
    """One layer of causal attention, a shared linear layer, and two heads."""

    def __init__(self, balancer: Balancer, form: str, ranks: Ranks) -> None:
        super().__init__()
        self.balancer, self.form, self.ranks = balancer, form, ranks
        self.inner, self.last = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.next, self.value = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 1)

    def trunk(self, x: Tensor) -> Tensor:
        query, *others = self.inner(x).chunk(3, dim=-1)
        start = 0
        if self.ranks.context is not None:
            start = self.ranks.half * x.shape[1]
            others = [self.gathered(other, start) for other in others]
        key, value = others
        scores = query @ key.mT / WIDTH**0.5
        later = torch.arange(key.shape[1]) > start + torch.arange(x.shape[1])[:, None]
        return x + scores.masked_fill(later, -torch.inf).softmax(-1) @ value

    def gathered(self, part: Tensor, start: int) -> Tensor:
        """Whole sequences from the parts of all context ranks; its backward sums what each asks for."""
        beside = (0, 0, start, TOKENS - start - part.shape[1])
        return all_reduce(F.pad(part, beside), group=self.ranks.context)

    def forward(self, x: Tensor, classes: Tensor, mask: Tensor, ids: Tensor) -> Tensor:
        h = self.trunk(x)
        layer = {"layer": self.last} if isinstance(self.balancer.probe, SharedLayerProbe) else {}
        z = h if layer else self.last(h)
        if self.form == "tokens":
            return self.balancer(
                z, lambda z: self.by_token(z, classes, ids), task_ids=ids, mask=mask, **layer
            )
        # the graph of every loss is walked through on every rank, for its collectives
        given = self.form == "losses, parameters"
        # how many tokens of each task are on this rank: none of "next" in some halves
        own = {"next": mask & (ids == 0), "value": mask}
        heads = {
            "next": lambda z: mean(self.next_token(z, classes), own["next"], always=given),
            "value": lambda z: mean(self.values(z, classes), own["value"], always=given),
        }
        counts = {task: int(of_task.sum()) for task, of_task in own.items()}
        if self.form == "whole":
            heads["value"] = lambda z: self.of_sequence(z, classes)
            counts["value"] = len(x)  # every context rank has this loss of all its sequences
        if self.form.startswith("losses"):
            at = {"parameters": [*self.inner.parameters(), *self.last.parameters()]} if given else {}
            return self.balancer({task: head(z) for task, head in heads.items()}, counts=counts, **at)
        return self.balancer(z, heads, counts=counts)

    def next_token(self, z: Tensor, classes: Tensor) -> Tensor:
        return F.cross_entropy(self.next(z).movedim(-1, 1), classes, reduction="none")

    def values(self, z: Tensor, classes: Tensor) -> Tensor:
        return (self.value(z)[..., 0] - classes / 5).square()

    def by_token(self, z: Tensor, classes: Tensor, ids: Tensor) -> Tensor:
        return torch.where(ids == 0, self.next_token(z, classes), self.values(z, classes))

    def of_sequence(self, z: Tensor, classes: Tensor) -> Tensor:
        """A loss that is no sum over tokens: of the mean features of a sequence."""
        sums, first = z.sum(1), classes.sum(1) / TOKENS
        if self.ranks.context is not None:
            # its backward sums too, so the gradients of both ranks' equal losses meet at every token
            sums, first = (all_reduce(part, group=self.ranks.context) for part in (sums, first))
        return F.mse_loss(self.value((sums / TOKENS).tanh())[:, 0], first)


def mean(values: Tensor, mask: Tensor, *, always: bool) -> Tensor | None:
    if always:
        return (values * mask).sum() / mask.sum().clamp(min=1)
    return values[mask].mean() if mask.any() else None


def batch(step: int, ranks: Ranks) -> tuple[Tensor, ...]:
    """Tokens, classes, which tokens count, and the task of each."""
    read = []
    for data in (0, 1) if ranks.data is None else (ranks.data,):
        generator = torch.Generator().manual_seed(10 * step + data)
        x = torch.randn(SEQUENCES, TOKENS, WIDTH, generator=generator)
        ids = (torch.rand(SEQUENCES, TOKENS, generator=generator) < 0.6).long()
        if data == 0:
            ids[:, TOKENS // 2 :] = 1  # no token of the first task in this half
        mask = torch.rand(SEQUENCES, TOKENS, generator=generator) < 0.8
        read.append((x, (x.abs().sum(-1) % 5).long(), mask, ids))
    return tuple(ranks.own(torch.cat(parts)) for parts in zip(*read, strict=True))


def train(case: Case, ranks: Ranks, group: dist.ProcessGroup | None) -> dict[str, Any]:
    torch.manual_seed(3)
    balancer = case.make(group)
    net = Net(balancer, case.form, ranks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    weights, grams = [], []
    for step in range(STEPS):
        net(*batch(step, ranks)).backward()
        for parameter in net.parameters() if dist.is_initialized() else ():
            # the mean over all ranks that hold different tokens, as FSDP2 takes it over data and context
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()
        report = balancer.report
        weights.append(report.weight_vector.clone())
        grams.append(torch.zeros(()) if report.stats.gram is None else report.stats.gram.clone())
        optimizer.step()
        optimizer.zero_grad()
    parameters = [parameter.detach() for parameter in net.parameters()]
    return {"weights": torch.stack(weights), "grams": torch.stack(grams), "parameters": parameters}


def alone(name: str) -> dict[str, Any]:
    """One process with whole sequences."""
    return train(CASES[name], Ranks(), None)


def main() -> None:
    rank, world_size = start()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    assert (world_size, mesh["dp"].size(), mesh["cp"].size()) == (4, 2, 2)
    both = mesh["dp", "cp"]._flatten("dp_cp").get_group()
    ranks = Ranks(mesh["dp"].get_local_rank(), mesh["cp"].get_local_rank(), mesh["cp"].get_group())
    results = {name: train(case, ranks, both) for name, case in CASES.items()}
    if rank == 0:
        torch.save(results, sys.argv[1])
    stop()


if __name__ == "__main__":
    main()

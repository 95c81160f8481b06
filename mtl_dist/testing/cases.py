"""A zoo of (losses, Gram) that every rule must survive, seeded, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats


@dataclass(frozen=True)
class Case:
    """One step's losses and gradients.

    Attributes:
        name: for messages.
        losses: `[n]`, positive.
        gram: `[n, n]`, exactly symmetric, positive semidefinite up to rounding.
        ids: number of each task, which stays with it when tasks are permuted or left out.
    """

    name: str
    losses: Tensor
    gram: Tensor
    ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(self.n)))

    @property
    def n(self) -> int:
        """Number of tasks."""
        return len(self.losses)

    @property
    def tasks(self) -> tuple[str, ...]:
        """`task` with the number of each."""
        return tuple(f"task{i}" for i in self.ids)

    def only(self, order: Sequence[int]) -> Case:
        """The tasks at these positions, in this order."""
        index = torch.tensor(order)
        ids = tuple(self.ids[i] for i in order)
        return Case(self.name, self.losses[index], self.gram[index][:, index], ids)

    def stats(self, step: int = 0, *, with_gram: bool = True) -> TaskStats:
        """Statistics of a step in which all tasks are present, with four samples each."""
        return TaskStats(
            losses=self.losses.clone(),
            present=torch.ones(self.n, dtype=torch.bool),
            gram=self.gram.clone() if with_gram else None,
            counts=torch.full((self.n,), 4.0, dtype=torch.float64),
            step=step,
        )


def from_gradients(name: str, gradients: Tensor, losses: Tensor) -> Case:
    """The case of gradients `[n, p]` and losses `[n]`."""
    gram = gradients @ gradients.T
    return Case(name, losses.double(), (gram + gram.T) / 2)


def zoo() -> list[Case]:
    """About thirty cases: sizes, ranks, condition numbers, conflicts, zeros, duplicates, scales."""
    rng = torch.Generator().manual_seed(20220225)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def losses(n: int) -> Tensor:
        return (0.5 * normal(n)).exp()

    cases = [from_gradients(f"random n={n}", normal(n, n + 5), losses(n)) for n in (1, 2, 3, 8, 64)]
    cases += [
        from_gradients(f"rank {rank} of {n}", normal(n, rank) @ normal(rank, n + 5), losses(n))
        for n, rank in ((2, 1), (3, 1), (3, 2), (8, 1), (8, 4), (64, 7))
    ]
    for n, condition in ((3, 1e6), (8, 1e6), (8, 1e12)):  # of the Gram, so sqrt of it for the gradients
        left, right = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(n, n)).Q
        spectrum = torch.logspace(0, -0.5 * torch.tensor(condition).log10().item(), n, dtype=torch.float64)
        cases.append(from_gradients(f"condition {condition:g} n={n}", left * spectrum @ right, losses(n)))
    for n in (2, 3, 8):
        # every pair has a negative cosine, the simplex's -1/(n-1) but for a common part of 1 %
        opposed = torch.eye(n, dtype=torch.float64) - 0.99 / n
        cases.append(from_gradients(f"conflicting n={n}", opposed + 0.01 * normal(n, n), losses(n)))
        zero = normal(n, n + 5)
        zero[n // 2] = 0
        cases.append(from_gradients(f"zero gradient n={n}", zero, losses(n)))
        twins = normal(n, n + 5)
        twins[-1] = twins[0]
        cases.append(from_gradients(f"duplicates n={n}", twins, losses(n)))
    for scale in (1e-12, 1e-6, 1e6, 1e12):
        cases.append(from_gradients(f"all scaled {scale:g}", scale * normal(3, 8), scale * losses(3)))
    mixed = torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)
    cases.append(from_gradients("mixed scales", mixed[:, None] * normal(3, 8), mixed * losses(3)))
    cases.append(from_gradients("equal losses", normal(3, 8), torch.ones(3)))
    return cases


def stream(case: Case, steps: int = 5) -> list[TaskStats]:
    """The case over several steps: losses that fall unevenly, gradients that change length a little."""
    result = []
    for step, (fall, stretch) in enumerate(story(case.ids, steps)):
        moved = replace(case, losses=case.losses * fall, gram=case.gram * stretch)
        result.append(moved.stats(step))
    return result


@cache
def story(ids: tuple[int, ...], steps: int) -> list[tuple[Tensor, Tensor]]:
    """By what losses and Gram are multiplied at each step; nobody writes into it."""
    rng = torch.Generator().manual_seed(7)
    result = []
    for step in range(steps):
        # drawn for all task numbers, so that a permuted or thinned case tells the same story
        drift = torch.randn(2, 64, generator=rng, dtype=torch.float64)[:, list(ids)]
        stretch = torch.exp(0.1 * drift[1])
        result.append((torch.exp(-0.05 * step * (1 + 0.3 * drift[0])), torch.outer(stretch, stretch)))
    return result

"""What a probe is, and what it may ask of the balancer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from torch import Tensor

from mtl_dist._layout import Faults
from mtl_dist.probes._losses import Heads, Losses, TaskLosses
from mtl_dist.stats import LocalStats

T = TypeVar("T")


class Exchange(Protocol):
    """One step of a balancer, seen from a probe.

    Attributes:
        tasks: the n task names.
        measure: whether gradients are wanted at this step.
        step: index of this step, the same on every rank.
        rank: this rank's index among those that hold different samples.
    """

    tasks: Sequence[str]
    measure: bool
    step: int
    rank: int

    def collect(self, losses: Losses, device: torch.device) -> TaskLosses:
        """Checks the losses and adds the counts of this call."""
        ...

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce: the sum over ranks, and this rank's shares.

        A probe's first collective of a step: a rank that failed before tells the others in it. `faulty`,
        `[n]` bool, marks tasks in which this rank saw a NaN or infinity; None: those that `local` shows.
        """
        ...

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece `[n, ⌈D / W⌉]` of the sum of `rows`, `[n, D]`, over ranks; after `reduce`."""
        ...

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows `[b, ...]` of all ranks in rank order, `[Σ b, ...]`; after `reduce`. The host waits."""
        ...

    def partitioned(self, find: Callable[[], bool]) -> bool:
        """Whether the engine frees parameters after each use (ZeRO-3); `find` looks at the first step."""
        ...

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Scalar to differentiate losses with, and to divide gradients by; None where there is none."""
        ...

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gave when it was first asked for under `key`; it may communicate."""
        ...

    def refuse(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` as `watch`, for a flag of this rank alone: `reduce` then tells the others."""
        ...

    def watch(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds: now on the CPU, at the next step elsewhere.

        `flag`, a scalar bool, must be the same on all ranks.
        """
        ...

    def decide(self, reduced: Reduced) -> Tensor:
        """`[n]` weights from the global statistics, by the rule; the same on every rank. Once a step."""
        ...


@dataclass(frozen=True)
class Reduced:
    """Statistics summed over ranks.

    Attributes:
        total: the sum.
        faults: which ranks sent values that are not finite.
        shares: `[n]`, `s_i = W c_i / C_i` of this rank: what turns the engine's mean over ranks into the
            mean over samples. 0 for tasks absent on this rank.
        world_size: W, number of ranks.
    """

    total: LocalStats
    faults: Faults
    shares: Tensor
    world_size: int

    def with_gram(self, later: Reduced) -> Reduced:
        """These losses and counts, with the Gram of a later reduction of the same step."""
        return replace(self, total=self.total + later.total, faults=self.faults.first(later.faults))


class Probe(ABC):
    """Measures gradient statistics, and lets the weights re-enter the graph.

    Probes are frozen dataclasses without state: what a step needs lives in the step's graph.

    Attributes:
        every: steps from one measurement to the next; the weights hold in between.
        takes_layers: whether the probe is handed the layer given as `layer=` with its input (`LayerInput`);
            the others are handed its output.
        takes_functions: whether the probe calls a function that makes the features itself; the others are
            handed its result.
        grams_add: whether Grams of micro-batches add up to that of the whole batch, as they do where samples
            have gradients of their own.
    """

    every: int = 1
    takes_layers: ClassVar[bool] = False
    takes_functions: ClassVar[bool] = False
    grams_add: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, features: Any, heads: Heads, exchange: Exchange) -> Tensor:
        """The scalar whose backward, averaged over ranks by the engine, is that of `Σ α_i L_i`."""

"""What a probe is, and what it may ask of the balancer during one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from mtl_dist.canonical import ByValue
from mtl_dist.engines import EngineView
from mtl_dist.losses import Heads, LocalLosses
from mtl_dist.stats import LocalStats
from mtl_dist.sync import Summed


class StepContext(Protocol):
    """One step of a balancer, as a probe sees it.

    Attributes:
        tasks: the n task names.
        measure: whether gradients are wanted at this step.
        step: index of this step, the same on every rank.
        rank: index of this rank among those that hold different samples.
        engine: the engine around the balancer.
        memory: what `Probe.memory` made for this balancer.
        stateful: whether the rule has a state, so that the order of its updates matters.
    """

    tasks: Sequence[str]
    measure: bool
    step: int
    rank: int
    engine: EngineView
    memory: Any
    stateful: bool

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce: the sum over ranks, and the shares of this rank.

        It must be the first collective of a step: a rank that failed before it tells the others here.

        Args:
            local: statistics of this rank.
            faulty: `[n]` bool, tasks in which this rank saw a NaN or infinity; None: as `local` shows.
        """
        ...

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece `[n, ⌈D / W⌉]` of the sum of `rows`, `[n, D]`, over ranks; after `reduce`."""
        ...

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows `[b, ...]` of all ranks in rank order, `[Σ b, ...]`; after `reduce`. The host waits."""
        ...

    def refuse(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds: now on the CPU, at the next step elsewhere.

        `flag`, a scalar bool, is of this rank only: the next `reduce` tells the other ranks.
        """
        ...

    def decide(self, reduced: Reduced, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n]` weights from the global statistics, by the rule; the same on every rank. Once per step.

        Args:
            reduced: the statistics.
            dtype: of the weighted total, which the weights must fit into.
        """
        ...


class LaggedStep(StepContext, Protocol):
    """One step of a balancer with lag=1, as a probe sees it."""

    @property
    def world_size(self) -> int:
        """W, number of ranks."""
        ...

    def weights(self, losses: LocalLosses) -> Tensor:
        """`[n]`, `α`, the weights of this step, from the statistics before it; the same on every rank."""
        ...

    def visible_weights(self, losses: LocalLosses) -> tuple[Tensor, Tensor, Tensor]:
        """`[n]` each: `α`; `β`, weights that hide no gradient (at least 2⁻¹⁰ of the largest); and `α / β`."""
        ...

    def coefficients(self, losses: LocalLosses) -> Tensor:
        """`[n]`, `α_i s_i`, what the losses of this rank are multiplied with."""
        ...

    def shares(self, losses: LocalLosses) -> tuple[Tensor | None, Tensor]:
        """`[n]`, `s_i` of this rank (None: 1 for every task that it has), and `[n]`, `c_i / s_i`."""
        ...

    def send(self, local: LocalStats, faulty: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Starts the reduction of this step's statistics. The rule learns from them at the next step.

        Args:
            local: statistics of this rank.
            faulty: as for `reduce`.
            scale: what the step's scalar was differentiated with. With a factor of 0 nothing can be measured,
                and no task is to blame.
        """
        ...


@dataclass(frozen=True)
class Reduced:
    """Statistics summed over ranks.

    Attributes:
        total: the sum.
        summed: what was reduced for it, one or two sums.
        shares: `[n]`, `s_i = W c_i / C_i` of this rank: they turn the engine's mean over ranks into the mean
            over samples. 0 for tasks absent on this rank.
        world_size: W, number of ranks.
    """

    total: LocalStats
    summed: tuple[Summed, ...]
    shares: Tensor
    world_size: int

    def here(self) -> Reduced:
        """The same on the host, which waits for it."""
        summed = tuple([one.here() for one in self.summed])
        total = summed[0].total
        for later in summed[1:]:
            total = total + later.total
        return replace(self, total=total, summed=summed)

    def with_gram(self, later: Reduced) -> Reduced:
        """These losses and counts, with the Gram of a later reduction of the same step."""
        return replace(self, total=self.total + later.total, summed=self.summed + later.summed)


class ProbeMemory:
    """What a probe keeps from step to step for one balancer. Subclasses say what a resumed run needs."""

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, the same on every rank."""
        return {}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continues from what `state` gave, or from nothing.

        Raises:
            ValueError: it is damaged; nothing is changed then.
        """


class Probe(ByValue, ABC):
    """Measures gradient statistics, and lets the weights enter the graph again.

    Probes are objects of settings, best frozen dataclasses. What one step needs lives in the graph of that
    step.

    Attributes:
        every: steps from one measurement to the next; the weights hold in between.
        takes_layers: whether the probe receives the layer given as `layer=` with its input (`LayerInput`);
            the others receive the layer's output.
        takes_functions: whether the probe calls a function that makes the features itself; the others receive
            its result.
        at_features: whether the Gram is that of the gradients at the features.
        grams_add: whether Gram matrices of micro-batches add up to that of the whole batch. They do where
            samples have gradients of their own.
    """

    every: int = 1
    takes_layers: ClassVar[bool] = False
    takes_functions: ClassVar[bool] = False
    at_features: ClassVar[bool] = False
    grams_add: ClassVar[bool] = True

    @abstractmethod
    def __call__(self, features: Any, heads: Heads, step: StepContext) -> Tensor:
        """The scalar whose backward, averaged over ranks by the engine, is that of `Σ α_i L_i`."""

    def lagged(self, features: Any, heads: Heads, step: LaggedStep) -> Tensor:
        """The same with the weights from before this step, where the statistics may come later.

        Unless a probe can measure as the gradients pass, it measures as always.
        """
        return self(features, heads, step)

    def memory(self) -> ProbeMemory | None:
        """What the probe keeps from step to step, made once for each balancer; None: nothing."""
        return None


def later_gram(reduced: Reduced, gram: Tensor, faulty: Tensor, step: StepContext) -> Reduced:
    """`reduced` with a Gram that is known only now, by a second reduction of the same step.

    Args:
        reduced: the first reduction, of losses and counts.
        gram: `[n, n]`, this rank's part; the parts add.
        faulty: `[n]` bool, tasks in which this rank saw a NaN or infinity.
        step: this step.
    """
    nothing = LocalStats.zeros(len(gram), gram.device)
    return reduced.with_gram(step.reduce(nothing.with_gram(gram), faulty))

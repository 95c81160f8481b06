"""One training step: what a probe may ask of the balancer, and the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.balancer.errors import explain_failure, explain_nonfinite
from mtl_dist.balancer.identity import state_text
from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.checks import Check, Watches
from mtl_dist.engines import EngineView
from mtl_dist.losses import Heads
from mtl_dist.probes import Reduced
from mtl_dist.stats import LocalStats, StepReport, global_stats
from mtl_dist.sync import Call, Kind, Summed, Synchronizer
from mtl_dist.weighting import Needs


@dataclass
class Step:
    """One step of a balancer, as a probe sees it (`probes.StepContext`).

    Attributes:
        tasks: the n task names.
        step: index of this step.
        rank: index of this rank.
        measure: whether gradients are wanted.
        engine: around the balancer.
        memory: what the probe keeps from step to step.
        progress: of the balancer's rule.
        synchronizer: of the balancer.
        errors: that flags on the device decide.
        checker: looks at every step; None where nothing is checked.
        watches: look at the last steps now and then.
        strict: whether a NaN or infinity is an error.
        stateful: whether the rule has a state, so that the order of its updates matters.
        held: whether the weights stay as they are, and the rule learns nothing.
        kind: why the ranks meet first in this step.
        counts: `[n]`, C of the whole optimizer step where the engine knows it (`Engine.counts`); else None.
        news: a digest of the state that this rank loaded since the last call; 0 if it loaded none.
        reduced: whether the first collective of this step is done.
        scale: what the step's scalar was differentiated with, where it is measured in the backward.
    """

    tasks: Sequence[str]
    step: int
    rank: int
    measure: bool
    engine: EngineView
    memory: Any
    progress: RuleProgress
    synchronizer: Synchronizer
    errors: DeferredErrors
    checker: Check | None
    watches: Watches
    strict: bool
    held: bool = False
    stateful: bool = False
    kind: Kind = Kind.TRAINING
    counts: Tensor | None = None
    news: int = 0
    reduced: bool = False
    scale: Tensor | None = None
    _failed: Tensor | None = None
    _bad: Tensor | None = None
    _explicit: LocalStats | None = None

    @property
    def first_call(self) -> Call:
        """What the other ranks meet this rank in first."""
        return self.call(self.kind)

    def call(self, kind: Kind) -> Call:
        """A reduction of this step."""
        return Call(kind, self.step, self.news)

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce."""
        call = self.call(Kind.LATER if self.reduced else self.kind)
        summed = self.reduce_now(local, faulty, call)
        world_size = self.world_size
        # s_i = W c_i / C_i
        counts = local.counts if world_size == 1 else world_size * local.counts
        total = summed.total.counts if self.counts is None else self.counts.to(counts)
        shares = counts / total.clamp(min=torch.finfo(counts.dtype).tiny)
        return Reduced(summed.total, (summed,), shares, world_size)

    def reduce_now(self, local: LocalStats, faulty: Tensor | None, call: Call) -> Summed:
        """One all-reduce, as part of a given call."""
        self.reduced = True
        self._place(local)
        summed = self.synchronizer.reduce(local, faulty, self._failed, call, with_gram=local.gram is not None)
        self.look_at_ranks(summed, call)
        return summed

    def _place(self, local: LocalStats) -> None:
        """Where the statistics are, everything else goes."""
        if self.progress.weights.device != local.counts.device:
            self.progress.move_to(local.counts.device)

    def look_at_ranks(self, summed: Summed, call: Call) -> None:
        """Raises where a rank failed, or is in another call."""
        if self.world_size > 1:
            self.errors.judge(summed.copy, partial(self._explain_ranks, summed, call))

    def _explain_ranks(self, summed: Summed, call: Call) -> Exception | None:
        if summed.faults.failure.number:
            return explain_failure(self.step, summed.faults)
        if summed.faults.strangers(self.world_size):
            return self.synchronizer.explain_strangers(call, partial(state_text, self.progress))
        return None

    @property
    def world_size(self) -> int:
        """W, number of ranks."""
        return self.synchronizer.world_size

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece of a sum over ranks."""
        return self.synchronizer.scatter_sum(rows)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks."""
        return self.synchronizer.gather_rows(rows)

    def refuse(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds; the next `reduce` tells the other ranks."""
        self._failed = flag if self._failed is None else self._failed | flag
        self.errors.watch(flag, explain)

    def decide(self, reduced: Reduced, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n]` weights, the same on every rank."""
        if self.held:
            self._checked(reduced)
            return self.progress.hold(reduced.total)
        return self._decided(reduced, partial(self.progress.decide, dtype=dtype))

    def learn(self, reduced: Reduced, dtype: torch.dtype, closed: bool | None) -> StepReport | None:
        """As `decide`, for a step whose weights are used already.

        Args:
            reduced: as for `decide`.
            dtype: as for `decide`.
            closed: as for `RuleProgress.learn`.

        Returns:
            The report of the update; None before the first.
        """
        if not self.measure and self.progress.rule.needs_at(self.progress.step) > Needs.LOSSES:
            # a call before this one had no backward, so this is another step than was foreseen
            stats = global_stats(reduced.total, self.step, with_gram=False)
            return StepReport(tuple(self.tasks), stats, self.progress.weights, torch.tensor(True))
        self._decided(reduced, partial(self.progress.learn, dtype=dtype, closed=closed))
        return self.progress.report

    def _decided(self, reduced: Reduced, decide: Callable[..., Tensor]) -> Tensor:
        bad = self._checked(reduced)
        expected = self._expected(reduced, bad)
        used = decide(reduced.total, bad, measured=self.measure, counts=self.counts)
        self.watches.look(reduced.total.gram if self.measure else None, used, self.rank)
        if self.checker is not None and not bad:
            self.checker.look_at_weights(global_stats(reduced.total, self.step, with_gram=self.measure), used)
            if expected is not None:
                self.checker.compare_weights(expected, used, self.step)
        return used

    def observe(self, reduced: Reduced) -> None:
        """Gives losses from outside a step to the rule."""
        reduced = reduced.here() if self.progress.lag else reduced
        self.progress.observe(reduced.total, self._checked(reduced))

    def check(self, features: Any, heads: Heads) -> None:
        """Measures the step by plain autograd too, if the balancer checks."""
        if self.checker is not None and self.measure:
            self._explicit = self.checker.measure(features, heads, self)

    def _explicit_sum(self) -> Summed:
        """The explicit statistics of all ranks, by a reduction of their own."""
        assert self._explicit is not None
        return self.synchronizer.reduce(self._explicit, call=self.call(Kind.CHECK))

    def not_finite(self) -> bool:
        """Whether a statistic of this step was not finite. Waits for the device."""
        return self._bad is not None and bool(self._bad)

    def _checked(self, reduced: Reduced) -> Tensor:
        """Scalar bool: whether a loss or gradient of any rank is not finite. Raises where they must be."""
        first, *rest = [summed.bad for summed in reduced.summed]
        self._bad = reduce(torch.logical_or, rest, first)
        copy = reduced.summed[-1].copy
        if self.strict and (not copy.is_here or self._bad):
            # under a loss scale, gradients overflow now and then, and the engine skips those steps
            explain = partial(
                explain_nonfinite,
                self.tasks,
                self.step,
                reduced.summed,
                losses_only=self.engine.facts.scaled is not None,
                scale=self.scale,
                late=self.progress.lag or self.scale is not None,
            )
            self.errors.judge(copy, explain)
        return self._bad

    def _expected(self, reduced: Reduced, bad: Tensor) -> Tensor | None:
        """Compares the statistics with explicit ones; returns the `[n]` weights that those give."""
        check, progress = self.checker, self.progress
        if check is None or self._explicit is None:
            return None
        explicit = self._explicit_sum().total
        check.compare(explicit, reduced.total, self.step)
        if progress.window is not None or progress.lag:  # the weights follow from other statistics
            return None
        stats = global_stats(explicit, self.step, with_gram=True)
        weights, _ = progress.rule.update(stats.guarded(bad), progress.state)
        return torch.where(stats.present, weights, torch.zeros_like(weights))

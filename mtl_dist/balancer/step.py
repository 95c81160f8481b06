"""One training step: what a probe may ask of the balancer, and the decision."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from mtl_dist.stats import LocalStats, global_stats
from mtl_dist.sync import Call, Kind, Synchronizer


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
        reduced: whether the first collective of this step is done.
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
    reduced: bool = False
    _failed: Tensor | None = None
    _finite: Tensor | None = None
    _explicit: LocalStats | None = None

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce."""
        call = Call(Kind.LATER if self.reduced else self.kind, self.step)
        self.reduced = True
        if self.progress.weights.device != local.counts.device:
            self.progress.move_to(local.counts.device)
        total, faults = self.synchronizer.reduce(local, faulty, self._failed, call)
        world_size = self.synchronizer.world_size
        if world_size > 1:
            self.errors.watch(faults.failure[0] > 0, partial(explain_failure, self.step, faults))
            self.errors.watch(faults.strangers(world_size), partial(self._explain_strangers, call))
        # s_i = W c_i / C_i
        shares = world_size * local.counts / torch.where(total.counts > 0, total.counts, 1)
        return Reduced(total, faults, shares, world_size)

    def _explain_strangers(self, call: Call) -> Exception | None:
        return self.synchronizer.explain_strangers(call, partial(state_text, self.progress))

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
        finite = self._checked(reduced)
        expected = self._expected(reduced, finite)
        used = self.progress.decide(reduced.total, finite, measured=self.measure, dtype=dtype)
        self.watches.look(reduced.total.gram if self.measure else None, used, self.rank)
        if self.checker is not None and bool(finite):
            self.checker.look_at_weights(global_stats(reduced.total, self.step, with_gram=self.measure), used)
            if expected is not None:
                self.checker.compare_weights(expected, used, self.step)
        return used

    def observe(self, reduced: Reduced) -> None:
        """Gives losses from outside a step to the rule."""
        self.progress.observe(reduced.total, self._checked(reduced))

    def check(self, features: Any, heads: Heads) -> None:
        """Measures the step by plain autograd too, if the balancer checks."""
        if self.checker is not None and self.measure:
            self._explicit = self.checker.measure(features, heads, self)

    def not_finite(self) -> bool:
        """Whether a statistic of this step was not finite. Waits for the device."""
        return self._finite is not None and not self._finite

    def _checked(self, reduced: Reduced) -> Tensor:
        """Scalar bool: whether losses and gradients of all ranks are finite. Raises where they must be."""
        total, faults = reduced.total, reduced.faults
        losses = total.loss_sums.isfinite().all()
        finite = losses & total.gram.isfinite().all() & (faults.failure[0] == 0)
        if self.strict:
            # under a loss scale, gradients overflow now and then, and the engine skips those steps
            needed = finite if self.engine.facts.scaled is None else losses
            self.errors.watch(~needed, partial(explain_nonfinite, self.tasks, self.step, faults))
        self._finite = finite
        return finite

    def _expected(self, reduced: Reduced, finite: Tensor) -> Tensor | None:
        """Compares the statistics with explicit ones; returns the `[n]` weights that those give."""
        check, progress = self.checker, self.progress
        if check is None or self._explicit is None:
            return None
        explicit, _ = self.synchronizer.reduce(self._explicit, call=Call(Kind.CHECK, self.step))
        check.compare(explicit, reduced.total, self.step)
        if progress.window is not None:  # these statistics are only a part of what the weights follow from
            return None
        stats = global_stats(explicit, self.step, with_gram=True)
        weights, _ = progress.rule.update(stats.guarded(finite), progress.state)
        return torch.where(stats.present, weights, torch.zeros_like(weights))

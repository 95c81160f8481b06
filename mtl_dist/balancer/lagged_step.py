"""One training step with lag=1: weights from before it, statistics that arrive after it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_dist.balancer.arriving import ArrivingReport
from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.balancer.step import Step
from mtl_dist.losses import LocalLosses
from mtl_dist.probes import Reduced
from mtl_dist.stats import LocalStats, StepReport
from mtl_dist.sync import Call, Kind, Summed

_FLOOR = 2.0**-10  # of the largest weight


@dataclass(kw_only=True)
class LaggedStep(Step):
    """One step, as a probe sees it (`probes.LaggedStep`).

    Rule, weights and state live on the host, where statistics arrive while the device goes on.

    Attributes:
        underway: the steps whose statistics have not arrived.
        expected: counts that were told before the call; None: none were.
        equal_counts: whether the user promises that all ranks have the same counts.
        closed: whether an optimizer step follows the call; None: the number of calls says so.
        updates: whether the rule will make an update with it.
        report: of that update, on its way; None while nobody asked for it.
    """

    underway: Underway
    expected: Expected | None = None
    equal_counts: bool = False
    closed: bool | None = None
    updates: bool = True
    report: ArrivingReport | None = None
    _dtype: torch.dtype = torch.float32
    _packed: tuple[LocalStats, Tensor | None] | None = None
    _measured: Reduced | None = None
    _finish: Callable[[], Summed] | None = None
    _finish_explicit: Callable[[], Summed] | None = None

    def weights(self, losses: LocalLosses) -> Tensor:
        """`[n]`, the weights of this step."""
        self._dtype = losses.dtype
        return self.progress.weights_on(losses.counts)

    def visible_weights(self, losses: LocalLosses) -> tuple[Tensor, Tensor, Tensor]:
        """`[n]` each: the weights, weights that hide no gradient, and the ratio of the two."""
        self._dtype = losses.dtype
        weights = self.progress.weights.tolist()  # they are on the host
        floor = _FLOOR * (max(map(abs, weights)) or 1.0)
        visible = [weight if abs(weight) >= floor else floor for weight in weights]
        ratio = [weight / seen for weight, seen in zip(weights, visible, strict=True)]
        counts = losses.counts
        rows = torch.tensor([weights, visible, ratio], dtype=counts.dtype)
        shown = rows.to(counts.device, non_blocking=True)
        return shown[0], shown[1], shown[2]

    def decide(self, reduced: Reduced, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[n]` weights of this step, for probes that measure before the backward."""
        self._dtype = dtype
        self._measured = reduced
        self._start_explicit()
        weights = self.progress.weights_on(reduced.total.counts)
        return weights.masked_fill(reduced.total.counts <= 0, 0)

    def shares(self, losses: LocalLosses) -> tuple[Tensor | None, Tensor]:
        """`[n]`, `s_i`, and `[n]`, `c_i / s_i`."""
        counts = losses.counts
        if self.expected is not None:  # also where nobody else reads them
            told = self.expected.local.counts.to(counts.device, non_blocking=True)
            self.refuse((told != counts).any(), partial(self._explain_expected, counts))
        if self.counts is not None:
            return self._shares_of(counts, self.counts.to(counts))
        if self.world_size == 1 or self.equal_counts:
            return None, counts
        own = LocalStats(torch.zeros_like(counts), counts, None, losses.stats().known)
        if self.expected is None:
            total = self.reduce_now(own, None, self.call(Kind.COUNTS)).total.counts
        else:
            self.reduced = True
            summed = self.expected.finish()
            self.look_at_ranks(summed, self.call(Kind.COUNTS))
            # told on the host, where the group can sum there
            total = summed.total.counts.to(counts.device, counts.dtype, non_blocking=True)
        return self._shares_of(counts, total)

    def _shares_of(self, counts: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        # s_i = W c_i / C_i
        shares = self.world_size * counts / total.clamp(min=torch.finfo(counts.dtype).tiny)
        return shares, (total / self.world_size).masked_fill(counts <= 0, 0)

    def coefficients(self, losses: LocalLosses) -> Tensor:
        """`[n]`, `α_i s_i`, what the losses of this rank are multiplied with."""
        weights, (shares, _) = self.weights(losses), self.shares(losses)
        return weights if shares is None else weights * shares

    def send(self, local: LocalStats, faulty: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Starts the reduction of this step's statistics."""
        self._packed = (local, faulty)
        self.scale = scale
        self.underway.advance()

    @property
    def is_measured(self) -> bool:
        """Whether its statistics are there, so that they can be sent."""
        return self._packed is not None or self._measured is not None

    def start(self) -> None:
        """Sends the statistics, if they were not sent yet."""
        if self._finish is None and self._packed is not None:
            local, faulty = self._packed
            self.reduced = True
            self._finish = self.synchronizer.start_reduce(
                local, faulty, self._failed, self._call, with_gram=local.gram is not None
            )
            self._start_explicit()

    def _start_explicit(self) -> None:
        """Sends what a check measured, now: ranks may read what arrives at different moments."""
        if self._explicit is not None:
            self._finish_explicit = self.synchronizer.start_reduce(
                self._explicit, None, None, self.call(Kind.CHECK), with_gram=True
            )

    def _explicit_sum(self) -> Summed:
        return super()._explicit_sum() if self._finish_explicit is None else self._finish_explicit()

    def finish(self) -> None:
        """Waits for the statistics, and lets the rule learn from them."""
        arrived = self.learn(self._arrived(), self._dtype, self.closed)
        if self.report is not None:
            self.report.arrived = arrived
            self.progress.report = self.report  # the object that was asked for, so that it is not read twice

    def _arrived(self) -> Reduced:
        """The statistics on the host, which waits for them."""
        if self._measured is not None:
            return self._measured.here()
        assert self._finish is not None
        summed = self._finish()
        self.synchronizer.notice.hear(summed, late=True)
        self.look_at_ranks(summed, self._call)
        if self.equal_counts and self.world_size > 1:
            self.errors.judge(summed.copy, partial(self._explain_counts, summed))
        return Reduced(summed.total, (summed,), summed.total.counts, self.world_size)

    @property
    def first_call(self) -> Call:
        """What the other ranks meet this rank in first."""
        known = self.equal_counts or self.expected is not None or self.counts is not None
        return self._call if known else self.call(Kind.COUNTS)

    @property
    def _call(self) -> Call:
        return self.call(Kind.LAGGED)

    def _explain_expected(self, own: Tensor) -> Exception:
        assert self.expected is not None
        pairs = zip(self.tasks, self.expected.local.counts.tolist(), own.tolist(), strict=True)
        wrong = [f"{task!r}: {told:g} and then {got:g}" for task, told, got in pairs if told != got]
        return ValueError(
            f"mtl_dist, step {self.step}: balancer.expect told other counts than this call has, for task "
            f"{', '.join(wrong)}. Give both the same (0 for a task whose head returns None)"
        )

    def _explain_counts(self, summed: Summed) -> Exception | None:
        wrong = summed.faults.unequal_counts(self.world_size)
        if not wrong:
            return None
        return ValueError(
            f'mtl_dist, step {self.step}: counts="equal" promises that all ranks have the same counts, and '
            f"they differ for task {[self.tasks[task] for task in wrong]}, so the gradients of this step "
            'were not those of the whole batch. Use counts="given", or batches of equal size (drop_last=True)'
        )


@dataclass(frozen=True)
class Expected:
    """Counts that were told before their call, and their sum over ranks.

    Attributes:
        local: with the counts of this rank.
        finish: waits for the sum.
    """

    local: LocalStats
    finish: Callable[[], Summed]

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """A sum on its way belongs to this process: a copy expects nothing."""
        return type(None), ()


class Underway:
    """The steps whose statistics have not arrived, in the order of their calls.

    All ranks send in this order, whatever the order of their backwards. A call whose backward does not come,
    while that of a later call does, was no training step: it is forgotten.
    """

    def __init__(self) -> None:
        self._steps: deque[LaggedStep] = deque()

    def __reduce__(self) -> tuple[type[Underway], tuple[()]]:
        """What is not measured belongs to this process; a copied balancer waits for the rest before."""
        return Underway, ()

    def ahead(self, progress: RuleProgress) -> int:
        """How many updates of the rule these steps will make."""
        if progress.window is None:
            return len(self._steps)
        closed = [step.closed for step in self._steps]
        if None in closed:
            return progress.closes_within(len(closed))
        return sum(map(bool, closed))

    def updates_next(self, progress: RuleProgress, closed: bool | None) -> bool:
        """Whether the rule will make an update with a new call.

        Args:
            progress: of the rule.
            closed: as for `LaggedStep`.
        """
        if progress.window is None:
            return True
        calls = len(self._steps)
        return progress.closes_within(calls + 1) > progress.closes_within(calls) if closed is None else closed

    def begin(self, **parts: Any) -> LaggedStep:
        """A new call; see `LaggedStep`."""
        step = LaggedStep(underway=self, **parts)
        self._steps.append(step)
        return step

    def forget(self, step: object) -> None:
        """Forgets a call that failed."""
        self._steps = deque(other for other in self._steps if other is not step)

    def report(self) -> StepReport | None:
        """Of the newest update whose statistics are on their way; None: there is none."""
        for step in reversed(self._steps):
            if step.is_measured and step.updates:
                if step.report is None:
                    step.report = ArrivingReport(tuple(step.tasks), step.step, self.arrive)
                return step.report
        return None

    def advance(self) -> None:
        """Sends what is measured, up to the first call that is not."""
        for step in self._steps:
            if not step.is_measured:
                return
            step.start()

    def clear(self) -> None:
        """Forgets all calls."""
        self._steps.clear()

    def arrive(self) -> None:
        """Waits for all that was measured, and lets the rule learn from it, in order."""
        last = max((place for place, step in enumerate(self._steps) if step.is_measured), default=-1)
        arriving = [self._steps.popleft() for _ in range(last + 1)]
        measured = [step for step in arriving if step.is_measured]
        for step in measured:
            step.start()
        for step in measured:
            step.finish()

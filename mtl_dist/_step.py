"""One training step: what a probe may ask of the balancer, and the decision."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtl_dist._alarm import Alarm
from mtl_dist._check import Check
from mtl_dist._course import Course
from mtl_dist._diagonal import DiagonalWatch, explain_diagonal
from mtl_dist._explain import explain_failure, explain_nonfinite
from mtl_dist.probes import Counts, Heads, Losses, Probe, Reduced, TaskLosses
from mtl_dist.probes._losses import collect
from mtl_dist.probes._partitioned import ZERO_3
from mtl_dist.stats import LocalStats, global_stats
from mtl_dist.sync import Synchronizer
from mtl_dist.weighting import Needs

_LOGGER = logging.getLogger("mtl_dist")

T = TypeVar("T")


@dataclass
class Session:
    """What the steps of a balancer have in common.

    Attributes:
        probe: of the balancer.
        strict: whether a NaN or infinity is an error.
        synchronizer: of the balancer.
        alarm: raises what its flags say.
        course: of the rule.
        check: looks at every step; None where nothing is checked.
        diagonal: notices a Gram that is diagonal by construction; None where it does not matter, or was said.
        made: what probes made once.
        partitioned: whether the engine frees parameters after each use; None: not known yet.
    """

    probe: Probe
    strict: bool
    synchronizer: Synchronizer
    alarm: Alarm
    course: Course
    check: Check | None
    diagonal: DiagonalWatch | None = None
    made: dict[str, Any] = field(default_factory=dict)
    partitioned: bool | None = None

    def __post_init__(self) -> None:
        if self.course.rule.needs == Needs.GRAM:
            self.diagonal = DiagonalWatch()

    def step(self, counts: Counts | None, *, measure: bool) -> Step:
        """The next step."""
        return Step(self, counts, measure)


class Step:
    """One training step, as a probe sees it (`probes.Exchange`).

    Args:
        session: of the balancer.
        counts: given by the user; None for 1 where a task is present.
        measure: whether gradients are wanted.
    """

    def __init__(self, session: Session, counts: Counts | None, measure: bool) -> None:
        self.tasks: Sequence[str] = session.course.tasks
        self.measure = measure
        self.step = session.course.step
        self.rank = session.synchronizer.rank
        self.reduced = False
        self._session = session
        self._counts = counts
        self._failed: Tensor | None = None
        self._finite: Tensor | None = None
        self._explicit: LocalStats | None = None

    def collect(self, losses: Losses, device: torch.device) -> TaskLosses:
        """Checks the losses and adds the counts of this call."""
        return collect(losses, self._counts, self.tasks, device)

    def reduce(self, local: LocalStats, faulty: Tensor | None = None) -> Reduced:
        """One all-reduce."""
        synchronizer = self._session.synchronizer
        self._session.course.move_to(local.counts.device)
        self.reduced = True
        total, faults = synchronizer.reduce(local, faulty, self._failed)
        self.watch(faults.failure[0] > 0, partial(explain_failure, self.step, faults))
        # s_i = W c_i / C_i
        shares = synchronizer.world_size * local.counts / torch.where(total.counts > 0, total.counts, 1)
        return Reduced(total, faults, shares, synchronizer.world_size)

    def scatter_sum(self, rows: Tensor) -> Tensor:
        """This rank's piece of a sum over ranks."""
        return self._session.synchronizer.scatter_sum(rows)

    def gather_rows(self, rows: Tensor) -> Tensor:
        """The rows of all ranks."""
        return self._session.synchronizer.gather_rows(rows)

    def partitioned(self, find: Callable[[], bool]) -> bool:
        """Whether the engine frees parameters after each use; `find` looks, once."""
        session = self._session
        if session.partitioned is None:
            known = session.course.engine.partitioned
            session.partitioned = find() if known is None else known
            if session.partitioned:
                self._say(f"mtl_dist: {ZERO_3}; probes evaluate the heads a second time")
        return session.partitioned

    def loss_scale(self, device: torch.device) -> Tensor | None:
        """Scalar to differentiate losses with and divide out; None where there is no loss scale."""
        scaled = self._session.course.engine.scaled
        return None if scaled is None else scaled(torch.ones((), device=device))

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make` gave the first time."""
        made = self._session.made
        if key not in made:
            made[key] = make()
        value: T = made[key]
        return value

    def refuse(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds; the next `reduce` tells the others."""
        self._failed = flag if self._failed is None else self._failed | flag
        self.watch(flag, explain)

    def watch(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` holds."""
        self._session.alarm.watch(flag, explain)

    def decide(self, reduced: Reduced) -> Tensor:
        """`[n]` weights, the same on every rank."""
        if self.measure:
            self._look_at(reduced.total)
        finite = self._checked(reduced)
        expected = self._expected(reduced, finite)
        used = self._session.course.decide(reduced.total, finite, measured=self.measure)
        check = self._session.check
        if check is not None and bool(finite):
            check.look_at_weights(global_stats(reduced.total, self.step, with_gram=self.measure), used)
            if expected is not None:
                check.compare_weights(expected, used, self.step)
        return used

    def observe(self, reduced: Reduced) -> None:
        """Hands losses from outside a step to the rule."""
        self._session.course.observe(reduced.total, self._checked(reduced))

    def check(self, features: Any, heads: Heads) -> None:
        """Measures the step by plain autograd, where the balancer checks."""
        if self._session.check is not None and self.measure:
            self._explicit = self._session.check.measure(features, heads, self)

    def unsound(self) -> bool:
        """Whether something was not finite; waits for the device."""
        return self._finite is not None and not self._finite

    def _checked(self, reduced: Reduced) -> Tensor:
        """Scalar bool: whether losses and gradients of all ranks are finite. Raises where they must be."""
        total, faults = reduced.total, reduced.faults
        losses = total.loss_sums.isfinite().all()
        finite = losses & total.gram.isfinite().all() & (faults.failure[0] == 0)
        if self._session.strict:
            # under a loss scale, gradients overflow now and then, and the engine skips those steps
            needed = finite if self._session.course.engine.scaled is None else losses
            self.watch(~needed, partial(explain_nonfinite, self.tasks, self.step, faults))
        self._finite = finite
        return finite

    def _look_at(self, total: LocalStats) -> None:
        """Says once that the rule can see no conflict, where that is so by construction."""
        session = self._session
        if session.diagonal is not None and session.diagonal(total):
            session.diagonal = None
            self._say(explain_diagonal(session.course.rule, session.probe))

    def _expected(self, reduced: Reduced, finite: Tensor) -> Tensor | None:
        """Compares the statistics with explicit ones; the `[n]` weights that those give, if one step does."""
        check, course = self._session.check, self._session.course
        if check is None or self._explicit is None:
            return None
        explicit, _ = self._session.synchronizer.reduce(self._explicit)
        check.compare(explicit, reduced.total, self.step)
        if course.window is not None:
            return None
        stats = global_stats(explicit, self.step, with_gram=True)
        weights, _ = course.rule.update(stats.guarded(finite), course.state)
        return torch.where(stats.present, weights, torch.zeros_like(weights))

    def _say(self, text: str) -> None:
        if self.rank == 0:
            _LOGGER.warning(text)

"""What surrounds the call of a balancer: ranks that meet, a new step, and the calls beside it."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from mtl_dist.balancer.client_losses import ClientLosses
from mtl_dist.balancer.lagged_step import Expected
from mtl_dist.balancer.members import BalancerMembers
from mtl_dist.balancer.step import Step
from mtl_dist.checks import Watches
from mtl_dist.losses import Counts, Losses, collect, told_counts
from mtl_dist.stats import LocalStats
from mtl_dist.sync import Call, Collectives, Kind, virtual_rank


class Collector(Protocol):
    """Takes the losses of calls in eval mode; see `collect_evaluation`."""

    def add(self, stats: LocalStats) -> None:
        """Takes those of one call."""


class BalancerCalls(BalancerMembers):
    """The calls of `Balancer` beside `forward`, and what they share with it."""

    _client: ClientLosses | None
    _probe_given: bool
    _strict: bool
    _watches: Watches
    _memory: Any
    _updates_left: int | None
    _expected: Expected | None
    _collector: Collector | None
    _twins: tuple[BalancerCalls, ...]

    @contextmanager
    def held(self, *, updates: int = 0) -> Iterator[None]:
        """Inside, the weights stay as they are: calls measure nothing, and the rule learns nothing.

        For optimizers that call a closure several times in one step and must minimise one function (L-BFGS,
        SAM), and for any other forward in training mode that is not a step of its own:

            with balancer.held(updates=1):
                optimizer.step(closure)

        The total is exact over ranks as always, so such a call makes one all-reduce. All ranks must hold
        the same calls.

        Args:
            updates: how many calls inside still update the rule, before the weights hold.
        """
        if isinstance(updates, bool) or not isinstance(updates, int) or updates < 0:
            raise ValueError(f"held: updates must be a number of calls >= 0, got {updates!r}")
        with self._set_inside("_updates_left", updates):
            yield

    def observe(self, losses: Losses, *, counts: Counts | None = None) -> None:
        """Gives losses that were measured outside the step to the rule; all ranks must call it.

        For rules that learn from them (`weighting.observes`): the batch's losses after the optimizer's step
        (FAMO), or validation losses (CoBa). One all-reduce. The weights change at the next step.

        Args:
            losses: scalar mean loss by task, of this rank's samples; None or absent where there are none.
            counts: samples behind each mean, as in a training step.

        Raises:
            ValueError: the rule does not learn from such losses, or as in a training step.
        """
        if (twin := self._virtual_twin()) is not None:
            twin.observe(losses, counts=counts)
            return
        if not self.weighting.observes:
            raise ValueError(f"{self.weighting!r} takes no losses from outside the step: do not call observe")
        if self._client is not None:
            losses, _, counts = self._client.read(losses, None, counts, None)
        self._connect()
        self._underway.arrive()
        step = self._new_step(Kind.OBSERVE)
        try:
            with torch.no_grad():
                local = collect(losses, counts, self.tasks, self._device_of(losses)).stats()
                step.observe(step.reduce(local))
        except Exception:
            if not step.reduced:
                self._synchronizer.announce_failure(step.first_call)
            raise
        self._synchronizer.news = 0

    def expect(self, counts: Counts) -> None:
        """Tells the counts of the next training call, so that their sum over ranks runs beside the trunk.

        With lag=1 and counts="given" only, where the sum of the counts is all that a call waits for. Call it
        before the trunk, on every rank, and give the call itself the same counts, or none:

            balancer.expect({"depth": len(depth), "normal": len(normal)})
            loss = balancer(trunk(x), heads)

        Told again before the call, as after an exception in the trunk, the new counts take the place of the
        old ones; every rank must tell equally often.

        Args:
            counts: as for the call; 0 for a task that is not named. Nothing is awaited in eval mode, or where
                the weights are held.

        Raises:
            ValueError: no count is awaited here (lag=0, or equal counts), or counts that cannot be.
        """
        if (twin := self._virtual_twin()) is not None:
            twin.expect(counts)
            return
        if not self.lag or self.counts == "equal":
            raise ValueError('expect: only lag=1 with counts="given" waits for counts alone: leave it out')
        held = self._updates_left is not None and self._updates_left <= 0
        if held or not (self.training and torch.is_grad_enabled()):
            return
        earlier, self._expected = self._expected, None
        if earlier is not None:  # of a step that failed before its call, and that its caller went on from
            earlier.finish()
        self._connect()
        self._underway.arrive()
        local = told_counts(counts, self.tasks, self._synchronizer.device)
        call = self._new_call(Kind.COUNTS)
        self._expected = Expected(local, self._synchronizer.start_counts(local, call))

    def become_virtual(self, collectives: Sequence[Collectives]) -> None:
        """Becomes rank 0 of several ranks in one process, with a copy of itself for each of the others.

        `mtl_dist.virtual.VirtualRanks` calls it.

        Raises:
            RuntimeError: a step was already taken.
        """
        self._twins = ()
        twins = [copy.deepcopy(self) for _ in collectives[1:]]
        for balancer, own in zip([self, *twins], collectives, strict=True):
            balancer._synchronizer.use(own)
        self._twins = tuple(twins)

    @contextmanager
    def collecting(self, collector: Collector) -> Iterator[None]:
        """Inside, calls in eval mode also give their losses to `collector`; see `collect_evaluation`."""
        with self._set_inside("_collector", collector):
            yield

    def _virtual_twin(self) -> BalancerCalls | None:
        """The copy that the running virtual rank calls; None for rank 0 and for real ranks."""
        rank = virtual_rank.get()
        if not rank or not self._twins:
            return None
        twin = self._twins[rank - 1]
        return twin.train(self.training)

    @contextmanager
    def _set_inside(self, name: str, value: Any) -> Iterator[None]:
        """Sets an attribute of this balancer and of its virtual ranks, and restores it afterwards."""
        balancers = (self, *self._twins)
        before = [getattr(balancer, name) for balancer in balancers]
        for balancer in balancers:
            setattr(balancer, name, value)
        try:
            yield
        finally:
            for balancer, outer in zip(balancers, before, strict=True):
                setattr(balancer, name, outer)

    def _device_of(self, losses: Any) -> torch.device:
        """Where losses are; where the statistics travel if this rank has none."""
        values = losses.values() if isinstance(losses, Mapping) else ()
        found = next((value.device for value in values if isinstance(value, Tensor)), None)
        return self._synchronizer.device if found is None else found

    # ---- made by `Balancer` ----

    @abstractmethod
    def _connect(self) -> None:
        """Meets the other ranks where they were not met."""

    @abstractmethod
    def _new_call(self, kind: Kind) -> Call:
        """The next call of this kind."""

    @abstractmethod
    def _new_step(self, kind: Kind) -> Step:
        """A step for the next call of this kind."""

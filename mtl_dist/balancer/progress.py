"""Where a rule is in its training: state, weights and step, which only move together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.balancer.arguments import weights_for_made_up_batches
from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.balancer.errors import explain_refusal
from mtl_dist.balancer.uses import Uses
from mtl_dist.engines import EngineView
from mtl_dist.stats import HOST, Elapsed, LocalStats, StepReport, TaskStats, global_stats, stats_dtype
from mtl_dist.sync import Stopwatch
from mtl_dist.weighting import Rule, State


class _Point(NamedTuple):
    state: State
    weights: Tensor
    step: int


class _Window(NamedTuple):
    total: LocalStats
    sound: Tensor
    calls: int


class RuleProgress:
    """Where a rule is, and how the statistics of one step take it further.

    Every decision is taken on the device, and nothing here waits for it. State, weights and step change
    together, so a step that the engine skipped can be forgotten.

    Args:
        tasks: names of the n tasks.
        rule: the rule.
        window: number of micro-batches whose statistics make one update, while the weights hold; None: each
            micro-batch makes one.
        engine: tells where windows end and which optimizer steps were skipped.
        stopwatch: of the collectives, for the report.
        errors: raises an error for statistics that the rule cannot take.
        uses: counts the backwards of the balancer's totals.
        strict: whether weights that are not finite are an error.
        lag: whether the weights of a call follow from the calls before it.

    Attributes:
        state: of the rule.
        weights: `[n]`, each task's weight at the last step it was present in. Before the first: those that
            the rule gives whatever the batch is (`Fixed`), else uniform.
        step: number of updates of the rule so far.
        report: of the last update; None before the first.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        rule: Rule,
        window: int | None,
        engine: EngineView,
        stopwatch: Stopwatch,
        errors: DeferredErrors,
        uses: Uses,
        *,
        strict: bool,
        lag: bool = False,
    ) -> None:
        self.tasks = tasks
        self.rule = rule
        self.lag = lag
        self.window = window
        self._engine = engine
        self._stopwatch = stopwatch
        self._strict = strict
        self._errors = errors
        self._uses = uses
        self._positive_losses = rule.positive_losses
        cpu = torch.device("cpu")
        with cpu:  # wherever the model is built, such as on the meta device
            state = rule.init(tasks, cpu)
            self.restart(state, _first_weights(rule, state, len(tasks)), 0)

    def restart(
        self, state: State, weights: Tensor, step: int, window: Mapping[str, Tensor] | None = None
    ) -> None:
        """Goes to a given point.

        Args:
            state: of the rule.
            weights: `[n]`.
            step: number of updates so far.
            window: what `window_state` gave; None: the start of a window.
        """
        self.state, self.weights, self.step = state, weights, step
        self.report: StepReport | None = None
        self._before = _Point(state, weights, step)
        self._window = _empty_window(weights) if window is None else _read_window(window)
        self._closed = self.window is None or self._window.calls % self.window == 0
        self._backwards_before = self._uses.backwards
        self._skipped_before = False

    @property
    def inside_window(self) -> bool:
        """Whether a window has begun, and goes on with the next call."""
        return self._window.calls > 0

    def window_state(self) -> dict[str, Tensor]:
        """The statistics of the window so far, by name; empty where weights do not hold for a window."""
        if self.window is None:
            return {}
        total, sound, calls = self._window
        n = len(self.tasks)
        gram = total.counts.new_zeros(n, n) if total.gram is None else total.gram
        sums = {"loss_sums": total.loss_sums, "counts": total.counts, "gram": gram}
        return {**sums, "sound": sound, "calls": torch.tensor(calls)}

    def begin(self) -> None:
        """Begins a training call: settles what came before, and asks whether an optimizer step follows."""
        self.settle()
        closes_window = self._engine.facts.closes_window
        self._closed = self._closes() if closes_window is None else closes_window()

    @property
    def closed_by_engine(self) -> bool | None:
        """Whether the engine says that an optimizer step follows this call; None: it says nothing."""
        return None if self._engine.facts.closes_window is None else self._closed

    def closes_within(self, calls: int) -> int:
        """How many windows end within the next calls, by their number."""
        return 0 if self.window is None else (self._window.calls + calls) // self.window

    def _closes(self) -> bool:
        """Whether the next call is the last one of its window, by their number."""
        return self.window is None or (self._window.calls + 1) % self.window == 0

    def settle(self) -> None:
        """At the end of an optimizer step: forgets all its updates, if the engine skipped it.

        Several calls may belong to one optimizer step. It has ended where a backward ran after a call that
        closes it, or where the engine says for the first time that it skipped one.
        """
        skipped = self._engine.facts.skipped
        if skipped is None or not self._closed or self.step == self._before.step:
            return
        is_skipped = skipped()
        backward_ran = self._uses.backwards > self._backwards_before
        if not (backward_ran or (is_skipped and not self._skipped_before)):
            return
        if is_skipped:
            self.state, self.weights, self.step = self._before
        self._before = _Point(self.state, self.weights, self.step)
        self._backwards_before, self._skipped_before = self._uses.backwards, is_skipped

    def move_to(self, device: torch.device) -> None:
        """Moves everything to the device of the statistics; with a lag these are on the host."""
        if not self.lag and self.weights.device != device:
            self.state, self.weights, _ = _moved(_Point(self.state, self.weights, self.step), device)
            self._before = _moved(self._before, device)
            self._window = _moved_window(self._window, device)

    def weights_on(self, like: Tensor) -> Tensor:
        """The weights on another device, in its precision; the host waits for nothing."""
        return self.weights.to(like.device, like.dtype, non_blocking=True)

    def hold(self, total: LocalStats) -> Tensor:
        """`[n]` weights of one call that does not update the rule; 0 for tasks absent on all ranks."""
        return _where_present(total, self.weights_on(total.counts))

    def decide(
        self,
        total: LocalStats,
        bad: Tensor,
        *,
        measured: bool,
        dtype: torch.dtype,
        counts: Tensor | None = None,
    ) -> Tensor:
        """`[n]` weights of one call; 0 for tasks absent on all ranks.

        Args:
            total: statistics of the call, summed over ranks.
            bad: scalar bool, whether a statistic is NaN or infinite.
            measured: whether they hold a Gram.
            dtype: of the weighted total, which the weights must fit into.
            counts: `[n]`, of the whole optimizer step, where the engine knows them.
        """
        if self.window is None:
            stats = global_stats(total, self.step, with_gram=measured)
            if counts is not None:
                stats = replace(stats, counts=counts.to(stats.counts))
            return self._update(stats, bad, dtype)
        held = self.weights
        whole = _Window(self._window.total + total, self._window.sound & ~bad, self._window.calls + 1)
        if self._closed:
            self._update(global_stats(whole.total, self.step, with_gram=measured), ~whole.sound, dtype)
            whole = _empty_window(self.weights)
        self._window = whole
        return _where_present(total, held)

    def learn(
        self,
        total: LocalStats,
        bad: Tensor,
        *,
        measured: bool,
        dtype: torch.dtype,
        closed: bool | None,
        counts: Tensor | None = None,
    ) -> Tensor:
        """As `decide`, for statistics of an earlier call.

        Args:
            total: as for `decide`.
            bad: as for `decide`.
            measured: as for `decide`.
            dtype: as for `decide`.
            counts: as for `decide`.
            closed: whether an optimizer step followed that call; None: the number of calls says so.
        """
        self._closed = self._closes() if closed is None else closed
        return self.decide(total, bad, measured=measured, dtype=dtype, counts=counts)

    def observe(self, total: LocalStats, bad: Tensor) -> None:
        """Gives losses measured outside the step to the rule."""
        stats = global_stats(total, self.step, with_gram=False)
        outside = self._outside_domain(stats)
        bad = bad if outside is None else bad | outside
        state = self.rule.observe(stats.guarded(bad), self.state)
        if outside is not None:
            self._errors.watch(outside, self._explanation(stats))
        self.state = _chosen(bad, state, self.state)

    def _update(self, stats: TaskStats, bad: Tensor, dtype: torch.dtype) -> Tensor:
        outside = self._outside_domain(stats)
        bad = bad if outside is None else bad | outside
        is_sound = bad.device.type == HOST and not bad
        weights, state = self.rule.update(stats if is_sound else stats.guarded(bad), self.state)
        unusable = ~(weights.abs().amax() <= torch.finfo(dtype).max)  # as NaN is
        if outside is not None or self._strict:
            flags = [flag for flag in (outside, unusable if self._strict else None) if flag is not None]
            refused = flags[0] if len(flags) == 1 else flags[0] | flags[1]
            if refused.device.type != HOST or refused:
                self._errors.watch(refused, self._explanation(stats))
        held = self.weights
        if is_sound and not unusable:  # the host knows, and nothing needs to be masked
            self.weights = torch.where(stats.present, weights, held)
            self.state = {key: state[key] for key in self.state}
        else:
            bad = bad | unusable
            self.weights = torch.where(bad | ~stats.present, held, weights)
            self.state = _chosen(bad, state, self.state)
        used = self.weights if self.window is None and not self.lag else held
        time = self._stopwatch.take() if self._stopwatch.laps else Elapsed()
        self.report = StepReport(self.tasks, stats, used * stats.present, bad, time)
        self.step += 1
        return self.report.weight_vector

    def _explanation(self, stats: TaskStats) -> Callable[[], Exception]:
        return partial(explain_refusal, self.tasks, self.rule, stats)

    def _outside_domain(self, stats: TaskStats) -> Tensor | None:
        """Scalar bool, whether a loss is not positive; None where the rule does not mind."""
        return (stats.losses <= 0).any() if self._positive_losses else None  # those of absent tasks are 1


def _first_weights(rule: Rule, state: State, n: int) -> Tensor:
    """`[n]` weights before any batch: the rule's own if two unlike batches give the same, else uniform."""
    found = weights_for_made_up_batches(rule, state, n)
    if len(found) == 2 and torch.equal(*found):
        return found[0]
    return torch.full((n,), 1 / n, dtype=stats_dtype(torch.device("cpu")))


def _where_present(total: LocalStats, weights: Tensor) -> Tensor:
    return weights.masked_fill(total.counts <= 0, 0)


def _empty_window(weights: Tensor) -> _Window:
    nothing = LocalStats.zeros(len(weights), weights.device)
    return _Window(nothing, torch.ones((), dtype=torch.bool, device=weights.device), 0)


def _read_window(state: Mapping[str, Tensor]) -> _Window:
    loss_sums, counts, gram = (state[name].detach().clone() for name in ("loss_sums", "counts", "gram"))
    total = LocalStats(loss_sums, counts, gram)
    return _Window(total, state["sound"].detach().clone(), int(state["calls"]))


def _moved_window(window: _Window, device: torch.device) -> _Window:
    dtype, total = stats_dtype(device), window.total
    gram = None if total.gram is None else total.gram.to(device, dtype)
    sums = LocalStats(total.loss_sums.to(device, dtype), total.counts.to(device, dtype), gram)
    return _Window(sums, window.sound.to(device), window.calls)


def _moved(point: _Point, device: torch.device) -> _Point:
    dtype = stats_dtype(device)
    state = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in point.state.items()
    }
    return _Point(state, point.weights.to(device, dtype), point.step)


def _chosen(bad: Tensor, new: State, old: State) -> State:
    """The new state, but the old one where `bad` holds."""
    return {key: torch.where(bad, value, new[key]) for key, value in old.items()}

"""Where a rule is in its training: state, weights and step, which only move together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.balancer.errors import explain_refusal
from mtl_dist.engines import EngineView
from mtl_dist.stats import LocalStats, StepReport, TaskStats, global_stats, stats_dtype
from mtl_dist.sync import Stopwatch
from mtl_dist.weighting import Rule, State


class _Point(NamedTuple):
    state: State
    weights: Tensor
    step: int


class _Window(NamedTuple):
    total: LocalStats
    sound: Tensor


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
        strict: whether weights that are not finite are an error.

    Attributes:
        state: of the rule.
        weights: `[n]`, each task's weight at the last step it was present in; uniform before the first.
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
        *,
        strict: bool,
    ) -> None:
        self.tasks = tasks
        self.rule = rule
        self.window = window
        self._engine = engine
        self._stopwatch = stopwatch
        self._strict = strict
        self._errors = errors
        self._positive_losses = rule.positive_losses
        cpu = torch.device("cpu")
        uniform = torch.full((len(tasks),), 1 / len(tasks), dtype=stats_dtype(cpu))
        self.restart(rule.init(tasks, cpu), uniform, 0)

    def restart(self, state: State, weights: Tensor, step: int) -> None:
        """Goes to a given point, at the start of a window."""
        self.state, self.weights, self.step = state, weights, step
        self.report: StepReport | None = None
        self._before = _Point(state, weights, step)
        self._window: _Window | None = None
        self._calls = 0
        self._closed = True  # whether an optimizer step follows, or followed, the last call

    def begin(self) -> None:
        """Begins a training call: settles what came before, and asks whether an optimizer step follows."""
        self.settle()
        if self._closed:
            self._before = _Point(self.state, self.weights, self.step)
            self._window = None
        self._calls += 1
        closes_window = self._engine.facts.closes_window
        if closes_window is not None:
            self._closed = closes_window()
        else:
            self._closed = self.window is None or self._calls % self.window == 0

    def settle(self) -> None:
        """Forgets the updates of the last window, if the engine skipped its optimizer step."""
        updated = self.step > self._before.step
        skipped = self._engine.facts.skipped
        if self._closed and updated and skipped is not None and skipped():
            self.state, self.weights, self.step = self._before

    def move_to(self, device: torch.device) -> None:
        """Moves everything to the device of the statistics."""
        if self.weights.device != device:
            self.state, self.weights, _ = _moved(_Point(self.state, self.weights, self.step), device)
            self._before = _moved(self._before, device)

    def decide(self, total: LocalStats, finite: Tensor, *, measured: bool) -> Tensor:
        """`[n]` weights of one call; 0 for tasks absent on all ranks.

        Args:
            total: statistics of the call, summed over ranks.
            finite: scalar bool, whether all statistics are free of NaN and infinity.
            measured: whether they hold a Gram.
        """
        held = self.weights
        if self.window is None:
            self._update(global_stats(total, self.step, with_gram=measured), finite)
            return _where_present(total, self.weights)
        before = self._window
        whole = (
            _Window(total, finite) if before is None else _Window(before.total + total, before.sound & finite)
        )
        self._window = whole
        if self._closed:
            self._update(global_stats(whole.total, self.step, with_gram=measured), whole.sound)
        return _where_present(total, held)

    def observe(self, total: LocalStats, finite: Tensor) -> None:
        """Gives losses measured outside the step to the rule."""
        stats = global_stats(total, self.step, with_gram=False)
        out_of_domain = self._out_of_domain(stats)
        sound = finite & ~out_of_domain
        state = self.rule.observe(stats.guarded(sound), self.state)
        self._errors.watch(out_of_domain, self._explanation(stats))
        self.state = _chosen(sound, state, self.state)

    def _update(self, stats: TaskStats, finite: Tensor) -> None:
        out_of_domain = self._out_of_domain(stats)
        sound = finite & ~out_of_domain
        weights, state = self.rule.update(stats.guarded(sound), self.state)
        usable = weights.isfinite().all()
        refused = out_of_domain | ~usable if self._strict else out_of_domain
        self._errors.watch(refused, self._explanation(stats))
        sound = sound & usable
        held = self.weights
        self.weights = torch.where(sound & stats.present, weights, held)
        self.state = _chosen(sound, state, self.state)
        used = self.weights if self.window is None else held
        self.report = StepReport(self.tasks, stats, used * stats.present, ~sound, self._stopwatch.take())
        self.step += 1

    def _explanation(self, stats: TaskStats) -> Callable[[], Exception]:
        return partial(explain_refusal, self.tasks, self.rule, stats)

    def _out_of_domain(self, stats: TaskStats) -> Tensor:
        return (stats.present & (stats.losses <= 0)).any() & self._positive_losses


def _where_present(total: LocalStats, weights: Tensor) -> Tensor:
    return torch.where(total.counts > 0, weights, torch.zeros_like(weights))


def _moved(point: _Point, device: torch.device) -> _Point:
    dtype = stats_dtype(device)
    state = {
        key: value.to(device, dtype if value.is_floating_point() else None)
        for key, value in point.state.items()
    }
    return _Point(state, point.weights.to(device, dtype), point.step)


def _chosen(sound: Tensor, new: State, old: State) -> State:
    """The new state where `sound` holds, else the old one."""
    return {key: torch.where(sound, new[key], value) for key, value in old.items()}

"""The rule's course through training: its state, the weights, and the step, which only move together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist._engine import Engine
from mtl_dist._stopwatch import Stopwatch
from mtl_dist.stats import LocalStats, StepReport, TaskStats, global_stats, stats_dtype
from mtl_dist.weighting import Rule, State

Refuse = Callable[[Tensor, TaskStats], None]  # raises where the flag holds, in words about the statistics


class _Point(NamedTuple):
    state: State
    weights: Tensor
    step: int


class _Window(NamedTuple):
    total: LocalStats
    sound: Tensor


class Course:
    """Where a rule stands, and how one step's statistics take it further.

    Every decision is taken on the device, and nothing here waits for it. State changes by whole points
    (state, weights, step), so that a step which the engine skipped can be forgotten.

    Args:
        tasks: names of the n tasks.
        rule: whose course it is.
        window: micro-batches whose statistics make one update, while the weights hold; None: one each.
        stopwatch: of the collectives, for the report.
        strict: whether weights that are not finite are an error.
        refuse: raises for statistics that are an error.

    Attributes:
        state: the rule's.
        weights: `[n]`, each task's weight at the last step it was present in; uniform before the first.
        step: updates of the rule so far.
        report: of the last update; None before the first.
        engine: tells where windows end and which optimizer steps were skipped.
    """

    def __init__(
        self,
        tasks: tuple[str, ...],
        rule: Rule,
        window: int | None,
        stopwatch: Stopwatch,
        *,
        strict: bool,
        refuse: Refuse,
    ) -> None:
        self.tasks = tasks
        self.rule = rule
        self.window = window
        self.engine = Engine()
        self._stopwatch = stopwatch
        self._strict = strict
        self._refuse = refuse
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
        """Opens a training call: settles what came before, and asks whether an optimizer step follows."""
        self.settle()
        if self._closed:
            self._before = _Point(self.state, self.weights, self.step)
            self._window = None
        self._calls += 1
        if self.engine.closes_window is not None:
            self._closed = self.engine.closes_window()
        else:
            self._closed = self.window is None or self._calls % self.window == 0

    def settle(self) -> None:
        """Forgets the last window's updates, if the engine skipped its optimizer step."""
        updated = self.step > self._before.step
        if self._closed and updated and self.engine.skipped is not None and self.engine.skipped():
            self.state, self.weights, self.step = self._before

    def move_to(self, device: torch.device) -> None:
        """Takes everything to where the statistics are."""
        if self.weights.device != device:
            self.state, self.weights, _ = _moved(_Point(self.state, self.weights, self.step), device)
            self._before = _moved(self._before, device)

    def decide(self, total: LocalStats, finite: Tensor, *, measured: bool) -> Tensor:
        """`[n]` weights of one call; 0 for tasks absent on all ranks.

        Args:
            total: statistics of the call, summed over ranks.
            finite: scalar bool, whether the rule may see them as far as NaN and infinity go.
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
        """Hands losses measured outside the step to the rule."""
        stats = global_stats(total, self.step, with_gram=False)
        out_of_domain = self._out_of_domain(stats)
        sound = finite & ~out_of_domain
        state = self.rule.observe(stats.guarded(sound), self.state)
        self._refuse(out_of_domain, stats)
        self.state = _chosen(sound, state, self.state)

    def _update(self, stats: TaskStats, finite: Tensor) -> None:
        out_of_domain = self._out_of_domain(stats)
        sound = finite & ~out_of_domain
        weights, state = self.rule.update(stats.guarded(sound), self.state)
        usable = weights.isfinite().all()
        self._refuse(out_of_domain | ~usable if self._strict else out_of_domain, stats)
        sound = sound & usable
        held = self.weights
        self.weights = torch.where(sound & stats.present, weights, held)
        self.state = _chosen(sound, state, self.state)
        used = self.weights if self.window is None else held
        self.report = StepReport(self.tasks, stats, used * stats.present, ~sound, self._stopwatch.take())
        self.step += 1

    def _out_of_domain(self, stats: TaskStats) -> Tensor:
        return (stats.present & (stats.losses <= 0)).any() & self.rule.positive_losses


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

"""What a balancer shows and is told: results, state, process group, engine. Its call is in the facade."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from mtl_dist.balancer.arguments import CountsOf, OnNonfinite
from mtl_dist.balancer.deferred import DeferredErrors
from mtl_dist.balancer.identity import state_digest
from mtl_dist.balancer.lagged_step import Underway
from mtl_dist.balancer.progress import RuleProgress
from mtl_dist.balancer.state import read_state, write_state
from mtl_dist.balancer.typed_call import TypedCall
from mtl_dist.balancer.uses import Uses
from mtl_dist.checks import Check, Finding
from mtl_dist.engines import Engine, EngineView
from mtl_dist.probes import Probe
from mtl_dist.stats import StepReport
from mtl_dist.sync import Notice, Synchronizer
from mtl_dist.weighting import Rule

_FIXED = ("tasks", "weighting", "probe", "on_nonfinite", "lag", "counts")


class BalancerMembers(TypedCall):
    """The members of `Balancer` beside its call. `Balancer` makes the parts that are named here.

    Attributes:
        tasks: the task names.
        weighting: the rule.
        probe: how gradients are measured.
        on_nonfinite: what all ranks do about a NaN or infinite loss or gradient.
        lag: how many steps the weights lie behind the statistics they follow from.
        counts: with lag=1, whether counts are summed in each step, or promised to be equal.
    """

    tasks: tuple[str, ...]
    weighting: Rule
    probe: Probe
    on_nonfinite: OnNonfinite
    lag: int
    counts: CountsOf
    _underway: Underway
    _progress: RuleProgress
    _synchronizer: Synchronizer
    _errors: DeferredErrors
    _engine: EngineView
    _uses: Uses
    _check: Check | None
    _twins: Sequence[BalancerMembers]

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to change a setting, which would change what is shown and nothing else."""
        if name == "window" or (name in _FIXED and name in self.__dict__):
            raise AttributeError(
                f"balancer.{name} is fixed at construction, got {value!r}: make a new Balancer. Its "
                "load_state_dict takes the state of this one if tasks and rule are the same"
            )
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has what was measured: with lag=1, it waits for statistics that are on their way."""
        self._underway.arrive()
        return self.__dict__.copy()

    @property
    def uses(self) -> Uses:
        """How often it was called in training, and how often a backward passed through its total."""
        return self._uses

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold different samples; None: all ranks."""
        return self._synchronizer.group

    @property
    def notice(self) -> Notice:
        """A flag for all ranks: it travels in the reduction of a training step, without one of its own."""
        return self._synchronizer.notice

    def set_group(self, group: dist.ProcessGroup | None) -> None:
        """Sets the data-parallel group before the first step.

        Raises:
            ValueError: `group` is no process group.
            RuntimeError: a step was already taken with another group.
        """
        self._synchronizer.set_group(group)

    def set_engine(self, engine: Engine) -> None:
        """Tells the balancer about the engine: loss scale, skipped steps, accumulation, partitioning.

        The integrations' `attach` calls it; call it before the first step.

        Raises:
            ValueError: the weights hold for another number of micro-batches than the engine accumulates.
        """
        if self.window is not None and engine.accumulation not in (None, self.window):
            raise ValueError(
                f"the balancer holds its weights for window={self.window} micro-batches, and the engine "
                f"accumulates {engine.accumulation}: give both the same number"
            )
        self._engine.learn(engine)

    @property
    def report(self) -> StepReport | None:
        """What happened in the last training step (the last whole window); None before the first.

        Its values are waited for where they are read: with lag=1 they arrive after the step.
        """
        return self._underway.report() or self._progress.report

    @report.setter
    def report(self, report: StepReport | None) -> None:  # by checkpoints, which bring it back
        self._progress.report = report

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What `check=True` found, in the order it was found; virtual ranks after rank 0."""
        checks = [balancer._check for balancer in (self, *self._twins)]
        return tuple(finding for check in checks if check is not None for finding in check.findings.all())

    @property
    def step(self) -> int:
        """Number of training steps (windows, where weights are held) taken and not skipped by the engine."""
        self._underway.arrive()
        return self._progress.step

    @property
    def window(self) -> int | None:
        """Micro-batches for which the weights hold; None where each has its own."""
        return self._progress.window

    @property
    def weights(self) -> dict[str, float]:
        """The current weight of each task: that of the last step it was present in."""
        self._underway.arrive()
        return dict(zip(self.tasks, self._progress.weights.tolist(), strict=True))

    def extra_repr(self) -> str:
        """Tasks, rule and probe."""
        window = "" if self.window is None else f", window={self.window}"
        policy = f"on_nonfinite={self.on_nonfinite!r}"
        lag = f", lag={self.lag}, counts={self.counts!r}" if self.lag else ""
        return f"{list(self.tasks)}, {self.weighting}, probe={self.probe}, {policy}{window}{lag}"

    def state_dict(  # type: ignore[override]  # torch's overloads return what they are given
        self, *, destination: dict[str, Any] | None = None, prefix: str = "", keep_vars: bool = False
    ) -> dict[str, Any]:
        """Everything that the next step depends on: tensors, strings and numbers.

        As part of a model's state (`destination` given) it adds nothing, so model checkpoints do not depend
        on how the model was trained.
        """
        if destination is not None:
            return destination
        self._underway.arrive()
        self._errors.poll()
        self._progress.settle()
        return read_state(self._progress, self._memory)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> None:
        """Continues from a `state_dict`, bit for bit.

        Raises:
            ValueError: it belongs to other tasks or another rule; nothing is changed then.
        """
        self._errors.poll()
        self._underway.clear()
        write_state(self._progress, self._memory, state_dict)
        self._synchronizer.news = state_digest(self._progress)
        for twin in self._twins:
            twin.load_state_dict(state_dict)

    def check_virtual_agreement(self) -> None:
        """Raises `RuntimeError` unless all virtual ranks hold bitwise the same weights."""
        for balancer in (self, *self._twins):
            balancer._underway.arrive()
        for rank, twin in enumerate(self._twins, start=1):
            if not torch.equal(twin._progress.weights, self._progress.weights):
                raise RuntimeError(
                    f"mtl_dist: virtual rank {rank} has weights {twin.weights}, rank 0 {self.weights}; "
                    "the rule, the probe or a head takes something that is not the same on all ranks"
                )

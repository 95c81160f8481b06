"""The interface of a weighting rule: `Rule`, `Needs`, `State`, `Combinator`.

A rule is an object of hyperparameters, best a frozen dataclass, with two pure functions, `init` and `update`.
It never sees a model, a process group or a parameter. Its memory is a `State`, a flat dictionary of tensors
whose shapes `init` fixes. The state is also what a checkpoint stores.

A new rule needs this module, `mtl_dist.weighting.helpers`, `mtl_dist.weighting.checks` and, for problems in
the Gram matrix, `mtl_dist.solvers`. All of them are public. `docs/writing.md` is the guide, and
`mtl_dist.testing.check_rule` checks a new rule.

Terms in this package:

* step: one call of `Rule.update`, normally for one optimizer step.
* present: at least one rank had a sample of the task in this step; absent: no rank had one.
* Gram matrix: `Gᵢⱼ = ⟨gᵢ, gⱼ⟩`, `[n, n]`, with the task gradients `gᵢ`.
* zero gradient: `gᵢ = 0` exactly, for a task that is present.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import ClassVar, Self

import torch
from torch import Tensor

from mtl_dist.canonical import ByValue
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.checks import check_inner

State = dict[str, Tensor]


class Needs(IntEnum):
    """Which statistics a rule reads. A rule that reads only losses needs no gradient probe."""

    LOSSES = 0
    NORMS = 1
    GRAM = 2


class Rule(ByValue, ABC):
    """A weighting rule. Its class and its attributes are its identity: ranks and checkpoints compare them.

    Attributes:
        needs: the statistics that `update` reads.
        positive_losses: whether `update` takes logarithms or powers of losses. If so, the balancer raises
            `ValueError` on every rank for a loss <= 0, with the task, the value and the rule.
        observes: whether the rule also learns from losses measured outside the step (see `observe`).
        compares: whether the weights follow from comparing the tasks of one step. False for constant weights.
        own_batch: whether the weights are about the very batch that they follow from (its counts), so that
            those of an earlier one are wrong. The balancer refuses such a rule with a lag or a window.
        name: name in the command line and in YAML; empty for a rule outside the library.
        paper: authors, venue, year; a description if there is no paper.
        cost: time to compute the weights of n tasks from the statistics. "QP" is a quadratic program in n
            unknowns, solved to its optimality conditions; "host" means float64 on the CPU, for which an
            accelerator waits once. Times in milliseconds: `benchmarks/results/solvers.md`.
        degrees: (a, b): if all losses are multiplied by s, the weights are multiplied by `s^a`; if all
            gradients are, by `s^b`. None: the rule promises nothing, for example because a setting is in
            units of the losses.
        breaks: law of `mtl_dist.testing` that the rule does not keep by its nature -> the reason.
    """

    needs: ClassVar[Needs] = Needs.LOSSES
    positive_losses: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    own_batch: ClassVar[bool] = False
    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    degrees: ClassVar[tuple[float, float] | None] = None
    breaks: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """A rule for these tasks, for tests and documentation. What it gives a task follows from its name.

        Override it if the class needs arguments, or if its defaults depend on the order of the tasks.
        """
        return cls()

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """State before the first step: tensors of fixed shapes on `device`, constants included.

        Args:
            tasks: the n task names, in the order of every `[n]` tensor.
            device: device of the statistics.

        Raises:
            ValueError: a hyperparameter names an unknown task or omits one.
        """
        return {}

    @abstractmethod
    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights for this step, and the state for the next step.

        `mtl_dist.testing.check_rule` checks these requirements:

        * `update` does not modify the statistics or the state. The same input gives the same output, bit for
          bit, so all ranks compute the same weights. A random rule uses a generator that is seeded with
          `stats.step`.
        * Absent tasks (`~stats.present`) have no influence: the other tasks get the weights that the rule
          would give without the absent ones. The values returned for absent tasks must be finite. The
          balancer sets them to 0.
        * The state of an absent task does not change.
        * Closed forms stay on the device and never make it wait for the host. Iterative solvers may run on
          the CPU in float64 (`helpers.on_present`).
        * A test for zero is relative to the other values, never absolute.

        Args:
            stats: global statistics, finite, the same on every rank.
            state: result of `init` or of the previous `update`.

        Returns:
            `[n]` weights in the dtype of the statistics, and a state with the keys and shapes of `state`.
        """

    def observe(self, stats: TaskStats, state: State) -> State:
        """Learns from losses measured outside the step, for example validation losses.

        The docstring of each rule says which losses it expects. The requirements of `update` hold here too.

        Args:
            stats: global statistics of these losses. The rule reads neither their gradients nor their `step`.
            state: result of `init`, `update` or `observe`.

        Returns:
            A state with the keys and shapes of `state`.

        Raises:
            ValueError: the rule does not learn from such losses (`observes` is False).
        """
        raise ValueError(f"{self!r} takes no losses from outside the step: do not call observe")

    def needs_at(self, step: int) -> Needs:
        """The statistics that `update` reads at `step`: at most `needs`, less if this step needs less."""
        return self.needs


@dataclass(frozen=True)
class Combinator(Rule):
    """A rule that modifies another rule, the inner rule. It reads the statistics that the inner rule reads.

    Attributes:
        rule: the inner rule.
    """

    rule: Rule

    def __post_init__(self) -> None:
        check_inner(self, "rule", self.rule)

    @property
    def needs(self) -> Needs:  # type: ignore[override]  # depends on the instance; other rules set it per class
        """The statistics that the inner rule reads."""
        return self.rule.needs

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # as above
        """Whether the inner rule takes logarithms or powers of losses."""
        return self.rule.positive_losses

    @property
    def observes(self) -> bool:  # type: ignore[override]  # as above
        """Whether the inner rule learns from losses measured outside the step."""
        return self.rule.observes

    @property
    def compares(self) -> bool:  # type: ignore[override]  # as above
        """Whether the inner rule compares tasks."""
        return self.rule.compares

    @property
    def own_batch(self) -> bool:  # type: ignore[override]  # as above
        """Whether the weights of the inner rule are about its batch."""
        return self.rule.own_batch

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as above
        """The degrees of the inner rule."""
        return self.rule.degrees

    @property
    def breaks(self) -> Mapping[str, str]:  # type: ignore[override]  # as above
        """The laws that the inner rule does not keep."""
        return self.rule.breaks

    def observe(self, stats: TaskStats, state: State) -> State:
        """Passes the losses to the inner rule."""
        return {**state, **nest("rule", self.rule.observe(stats, unnest("rule", state)))}

    def needs_at(self, step: int) -> Needs:
        """The statistics that the inner rule reads at `step`."""
        return self.rule.needs_at(step)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The state of the inner rule."""
        return nest("rule", self.rule.init(tasks, device))


def nest(prefix: str, state: State) -> State:
    """The state of an inner rule as part of an outer state: `prefix.` is put before every key."""
    return {f"{prefix}.{key}": value for key, value in state.items()}


def unnest(prefix: str, state: State) -> State:
    """The inner state that `nest` put into `state`."""
    start = f"{prefix}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}

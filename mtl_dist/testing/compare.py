"""Runs a rule over several steps, changes statistics, and compares weights and states."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.testing.cases import Case, stream
from mtl_dist.weighting import Needs, Rule, State

CPU = torch.device("cpu")
RTOL = 1e-6

Factory = Callable[[Sequence[str]], Rule]
OfOneTask = Callable[[float, float], float]


@dataclass(frozen=True)
class Subject:
    """What the laws are tried on.

    Attributes:
        build: task names -> a new rule for them. What the rule gives a task follows from its name.
        single: the weight of a single task at the first step, from its loss and the norm of its gradient;
            None where nothing is promised.
    """

    build: Factory
    single: OfOneTask | None = None

    @classmethod
    def of(cls, rule: Rule | Factory, single: OfOneTask | None = None) -> Subject:
        """A subject that makes copies of one rule, or the rules of a function."""
        return cls((lambda tasks: copy.deepcopy(rule)) if isinstance(rule, Rule) else rule, single)


def run(rule: Rule, case: Case, steps: Sequence[TaskStats], state: State | None = None) -> list[Tensor]:
    """Weights of consecutive steps."""
    return [weights for weights, _ in trace(rule, case, steps, state)]


def trace(
    rule: Rule, case: Case, steps: Sequence[TaskStats], state: State | None = None
) -> list[tuple[Tensor, State]]:
    """Weights and states of consecutive steps. A rule that takes feedback is shown the next step's losses."""
    state = rule.init(case.tasks, CPU) if state is None else state
    result = []
    for stats, following in zip(steps, [*steps[1:], *steps[-1:]], strict=True):
        weights, state = rule.update(stats, state)
        if rule.observes:
            state = rule.observe(replace(following, gram=None), state)
        result.append((weights, state))
    return result


def judges(rule: Rule, case: Case) -> list[TaskStats]:
    """Statistics for `assert_same`: only a rule that reads the Gram may have more than one right answer."""
    if rule.needs is Needs.GRAM:
        return stream(case)
    return [replace(stats, gram=None) for stats in stream(case)]


def assert_same(got: Tensor, expected: Tensor, stats: TaskStats, message: str, rtol: float = RTOL) -> None:
    """Equal weights, or weights of the same update: where gradients are dependent, weights are not unique."""
    # what is below float32's range is 0 where the rule computed in float32
    if torch.allclose(got, expected, rtol=rtol, atol=torch.finfo(torch.float32).tiny):
        return
    if stats.gram is not None:
        difference = (got - expected).double()
        gap = (difference @ stats.gram.double() @ difference).clamp(min=0).sqrt()
        if gap <= rtol * (expected.double().abs() @ stats.grad_norms.double()):
            # tasks without gradient leave the update as it is: their weights must agree by themselves
            still = stats.grad_norms == 0
            if torch.allclose(got[still], expected[still], rtol=rtol, atol=0):
                return
    raise AssertionError(f"{message}: got {got.tolist()}, expected {expected.tolist()}")


def assert_equal_states(got: State, expected: State) -> None:
    """The same keys, and the same bits."""
    assert got.keys() == expected.keys(), f"the state has {[*got]}, expected {[*expected]}"
    for key, value in expected.items():
        assert torch.equal(got[key], value), f"state {key}: got {got[key]}, expected {value}"


def layout_of(state: State) -> dict[str, tuple[tuple[int, ...], torch.dtype, str]]:
    """Shape, dtype and device of each tensor."""
    return {key: (tuple(value.shape), value.dtype, value.device.type) for key, value in state.items()}


def clone(stats: TaskStats) -> TaskStats:
    """A copy that shares no memory."""
    gram = None if stats.gram is None else stats.gram.clone()
    losses, present, counts = (part.clone() for part in (stats.losses, stats.present, stats.counts))
    return replace(stats, losses=losses, present=present, gram=gram, counts=counts)


def to_float32(stats: TaskStats) -> TaskStats:
    """As on a device without float64."""
    gram = None if stats.gram is None else stats.gram.float()
    return replace(stats, losses=stats.losses.float(), gram=gram, counts=stats.counts.float())


def without(stats: TaskStats, *tasks: int) -> TaskStats:
    """The statistics of a step where no rank had a sample of these tasks."""
    present = stats.present.clone()
    present[list(tasks)] = False
    return replace(
        stats,
        losses=stats.losses.masked_fill(~present, 1.0),
        present=present,
        gram=stats.require_gram() * torch.outer(present, present),
        counts=stats.counts * present,
    )


def measure(stats: TaskStats, need: Needs) -> TaskStats:
    """What the balancer would have measured for this need. Off the diagonal, a decoy replaces what is not."""
    if need is Needs.LOSSES:
        return replace(stats, gram=None)
    if need is Needs.NORMS:
        return replace(stats, gram=torch.diag(stats.require_gram().diagonal()))
    return stats

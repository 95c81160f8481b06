"""The one way of a batch through every probe that knows its weights before the backward.

    heads -> local losses -> gradients at the features -> (the probe's own Gram) -> weights -> one scalar

A probe calls `evaluate`, makes its Gram from `Evaluation.measured`, reduces it, and calls `weigh`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_dist.engines import ZERO_3, depends_on, find_partitioned, replayed
from mtl_dist.losses import (
    Branches,
    FeatureGradients,
    Features,
    Heads,
    LocalLosses,
    TaskLosses,
    Views,
    anchored,
    split,
)
from mtl_dist.probes.base import Reduced, StepContext


@dataclass(frozen=True)
class Measured:
    """The losses of one evaluation of the heads, and their gradients at the features.

    Attributes:
        losses: of this rank.
        gradients: of these losses.
        leaves: of the features, where the gradients were taken.
    """

    losses: LocalLosses
    gradients: FeatureGradients
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Evaluation:
    """One batch after its heads have run.

    Attributes:
        shared: the features.
        losses: with the graph that the engine's backward will go through.
        measured: gradients at the features; None at a step without a measurement.
    """

    shared: Features
    losses: LocalLosses
    measured: Measured | None


def evaluate(
    features: Any,
    heads: Heads,
    step: StepContext,
    *,
    reevaluate: bool | None = None,
    before: Measured | None = None,
) -> Evaluation:
    """Runs the heads, and takes the gradients of all losses at the features.

    Args:
        features: any pytree with floating-point tensors.
        heads: of the model.
        step: this step.
        reevaluate: measure in an evaluation of its own, which leaves no trace, and run the heads again for
            the backward; None: where the engine needs it.
        before: such a measurement, if the probe has made it already.

    Raises:
        ValueError: a head that changes the features in place, or reads them past its argument;
            `reevaluate=False` where the engine needs it.
    """
    if step.measure and before is None and _reevaluates(reevaluate, features, heads, step):
        before = measure_without_trace(features, heads, step)
    shared = split(features, detach=False, num_branches=_num_branches(heads, step))
    losses = losses_at(shared, heads, step)
    if before is not None:
        check_same(before.losses, losses, step)
    elif step.measure:
        before = measure(shared, losses, step)
    return Evaluation(shared, losses, before)


def weigh(evaluation: Evaluation, reduced: Reduced, step: StepContext) -> Tensor:
    """`Σ α_i s_i l_i`, with the weights that follow from the reduced statistics."""
    weights = step.decide(reduced, evaluation.losses.dtype)
    total = evaluation.losses.total(weights * reduced.shares)
    return total if total.requires_grad else anchored(total, evaluation.shared.leaves)


def measure_without_trace(features: Any, heads: Heads, step: StepContext) -> Measured:
    """A measurement on detached features, with random state and module buffers as they were before."""
    shared = split(features, detach=True, num_branches=_num_branches(heads, step))
    with replayed(leaf.device for leaf in shared.leaves):
        return measure(shared, losses_at(shared, heads, step), step)


def measure(shared: Features, losses: LocalLosses, step: StepContext) -> Measured:
    """The gradients of all losses at the features."""
    with step.engine.before_backward(losses, shared.leaves) as scale:
        return Measured(losses, losses.gradients(shared.leaves, scale), shared.leaves)


def losses_at(shared: Features, heads: Heads, step: StepContext) -> LocalLosses:
    """The losses of the heads on the features.

    Raises:
        ValueError: a head changed the features in place.
    """
    if step.engine.units is not None:
        step.engine.units.release()
    versions = [leaf._version for leaf in shared.leaves]
    if shared.branches is None:
        losses = heads.at(shared.rebuild(), shared.leaves[0].device)
    else:
        losses = _on_views(shared, shared.branches, heads, step.tasks)
    if [leaf._version for leaf in shared.leaves] != versions:
        raise ValueError(
            "a head changed the features in place (nn.ReLU(inplace=True) first?): the other heads would read "
            "the changed values, and no gradient at the features would belong to one task; use the form out "
            "of place"
        )
    return losses


def _num_branches(heads: Heads, step: StepContext) -> int:
    """Each separable head gets its own views, so that one pass gives the gradients of all losses."""
    return len(step.tasks) if heads.separable and step.measure else 0


def _on_views(shared: Features, branches: Branches, heads: Heads, tasks: Sequence[str]) -> LocalLosses:
    losses = heads.on_views(branches)
    assert isinstance(losses, TaskLosses)  # separable heads give losses by task
    apart = entangled(losses, branches.views, shared, tasks) is None
    return replace(losses, views=branches.views) if apart else losses


def entangled(
    losses: TaskLosses, views: Views, shared: Features, tasks: Sequence[str]
) -> tuple[str, str] | None:
    """A task whose loss depends on the views of another task, and that other task; None: there is none.

    This happens when heads share a lazy decoder: the first head computes it, the others reuse the result.

    Raises:
        ValueError: a loss depends on the features past its views, where its gradient cannot be seen.
    """
    outside = len(tasks)
    found = depends_on(losses.values, {**dict(enumerate(views)), outside: shared.originals})
    for task, keys in enumerate(found):
        others = keys - {task}
        if outside in others:
            raise ValueError(
                f"the loss of task {tasks[task]!r} depends on the features other than through the argument "
                "of its function, so its gradient there cannot be measured: write "
                "balancer(z, {task: lambda z: ...}) and use that z"
            )
        if others:
            return tasks[task], tasks[min(others)]
    return None


def _reevaluates(wanted: bool | None, features: Any, heads: Heads, step: StepContext) -> bool:
    """Whether the heads are evaluated a second time: as wanted, else where the engine needs it.

    Raises:
        ValueError: not wanted, and needed.
    """
    if wanted:
        return True
    needed = step.engine.partitioned
    if needed is None:
        needed = step.engine.find_partitioned(
            lambda: find_partitioned(split(features, detach=False), heads), step.rank
        )
    if needed and wanted is False:
        raise ValueError(
            f"reevaluate=False: {ZERO_3}. Leave reevaluate out, so that the heads are evaluated a second "
            "time, or use FeatureTap()"
        )
    return needed


def check_same(first: LocalLosses, second: LocalLosses, step: StepContext) -> None:
    """Both evaluations must give the same losses, except for the order of sums on accelerators."""
    pairs = list(zip(first.means(), second.means(), strict=True))
    differ = [_differ(a, b, second.counts.device) for a, b in pairs]
    step.refuse(torch.stack(differ).any(), partial(_not_reproducible, step.tasks, pairs, differ))


def _differ(first: Tensor | None, second: Tensor | None, device: torch.device) -> Tensor:
    if first is None or second is None:
        return torch.tensor(first is not second, device=device)
    tolerance = torch.finfo(second.dtype).eps ** 0.5
    error = (first.detach() - second.detach()).abs()
    differ: Tensor = error > tolerance * first.detach().abs()
    return differ.to(device)


def _not_reproducible(
    tasks: Sequence[str], pairs: Sequence[tuple[Tensor | None, Tensor | None]], differ: Sequence[Tensor]
) -> RuntimeError:
    task, pair = next((t, p) for t, p, d in zip(tasks, pairs, differ, strict=True) if d)
    values = [None if loss is None else loss.item() for loss in pair]
    return RuntimeError(
        f"the probe evaluates the heads twice here, and the head of task {task!r} gave {values[0]} and "
        f"then {values[1]} on the same features and random state; it must not depend on state that changes "
        "from call to call. Use FeatureTap(), or reevaluate=False where the engine allows it"
    )

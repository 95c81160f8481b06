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
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from mtl_dist.engines import (
    ZERO_3,
    Past,
    SavedBuffers,
    depends_on,
    find_partitioned,
    remember_buffers,
    replayed,
    restore_buffers,
)
from mtl_dist.losses import (
    CHANGED,
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
from mtl_dist.probes.guards import (
    DERIVATIVE_OF_FREED,
    FREED,
    PARAMETERS,
    differentiates,
    guard,
    in_words,
    reads_inside,
    tell_unconnected,
)

_OUTSIDE = -1  # key of the features themselves, where heads were given something in their place


@dataclass(frozen=True)
class Measured:
    """The losses of one evaluation of the heads, and their gradients at the features.

    Attributes:
        losses: of this rank.
        gradients: of these losses.
        leaves: of the features, where the gradients were taken.
        past: whether a loss reaches the trunk other than through the features, so that the gradients at the
            features are not all.
    """

    losses: LocalLosses
    gradients: FeatureGradients
    leaves: tuple[Tensor, ...]
    past: bool = False


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
    follows: bool = False,
) -> Evaluation:
    """Runs the heads, and takes the gradients of all losses at the features.

    Args:
        features: any pytree with floating-point tensors.
        heads: of the model.
        step: this step.
        reevaluate: measure in an evaluation of its own, which leaves no trace, and run the heads again for
            the backward; None: where the engine needs it.
        before: such a measurement, if the probe has made it already.
        follows: whether the probe can follow losses that reach the trunk other than through the features.

    Raises:
        ValueError: a head that changes the features in place, reads them past its argument, or reaches the
            trunk past them; `reevaluate=False` where the engine needs it.
    """
    if step.measure and before is None and _reevaluates(reevaluate, features, heads, step):
        before = measure_without_trace(features, heads, step)
    shared = split(features, detach=False, num_branches=_num_branches(heads, step))
    losses, past = losses_at(shared, heads, step, follows=follows and before is None)
    if before is not None:
        check_same(before.losses, losses, step)
    elif step.measure:
        before = measure(shared, losses, step, past=past)
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
        with in_words():
            losses, _ = losses_at(shared, heads, step)
        return measure(shared, losses, step)


def measure(shared: Features, losses: LocalLosses, step: StepContext, *, past: bool = False) -> Measured:
    """The gradients of all losses at the features."""
    saved: SavedBuffers = {}  # of modules in a checkpoint, which run again for these gradients
    handle = register_module_forward_pre_hook(partial(remember_buffers, saved))
    try:
        with step.engine.before_backward(losses, shared.leaves) as scale:
            measured = Measured(losses, losses.gradients(shared.leaves, scale), shared.leaves, past)
    finally:
        handle.remove()
        if saved:
            restore_buffers(saved)
    if isinstance(losses, TaskLosses) and losses.known is None:
        guard(losses, measured.gradients, step)
    return measured


def losses_at(
    shared: Features, heads: Heads, step: StepContext, *, follows: bool = False
) -> tuple[LocalLosses, bool]:
    """The losses of the heads on the features, and whether one of them reaches the trunk past these.

    Raises:
        ValueError: a head changed the features in place; or, where gradients are wanted, a loss reads the
            features or the trunk other than through its argument.
    """
    if step.engine.units is not None:
        step.engine.units.release()
    versions = [leaf._version for leaf in shared.leaves]
    crossed: list[Any] = []
    handles = [
        leaf.grad_fn.register_hook(lambda *_: crossed.append(None))
        for leaf in shared.leaves
        if step.measure and leaf.grad_fn is not None
    ]
    try:
        if shared.branches is None:
            losses = heads.at(shared.rebuild(), shared.leaves[0].device)
        else:
            losses = heads.on_views(shared.branches)
    except RuntimeError as error:
        if FREED not in str(error):
            raise
        raise ValueError(DERIVATIVE_OF_FREED) from error
    for handle in handles:
        handle.remove()
    if [leaf._version for leaf in shared.leaves] != versions:
        raise ValueError(CHANGED)
    if not step.measure:
        return losses, False
    views = None if shared.branches is None else shared.branches.views
    pair, past = look(losses, views, shared, step, crossed=bool(crossed), follows=follows)
    if views is not None and pair is None:
        assert isinstance(losses, TaskLosses)  # separable heads give losses by task
        losses = replace(losses, views=views)
    return losses, past


def _num_branches(heads: Heads, step: StepContext) -> int:
    """Each separable head gets its own views, so that one pass gives the gradients of all losses."""
    return len(step.tasks) if heads.separable and step.measure else 0


def look(
    losses: LocalLosses,
    views: Views | None,
    shared: Features,
    step: StepContext,
    *,
    crossed: bool = False,
    follows: bool = False,
) -> tuple[tuple[str, str] | None, bool]:
    """Whether the gradient of each loss at the features is what its weight is about.

    Args:
        losses: of the heads.
        views: of the features, for each task; None: all heads were given the same features.
        shared: the features.
        step: this step.
        crossed: whether a head took a derivative past the features.
        follows: as for `evaluate`.

    Returns:
        A task whose loss depends on the views of another task, and that other task (heads share a lazy
        decoder: the first head computes it, the others reuse the result); None: there is none. And whether a
        loss reaches the trunk other than through the features.

    Raises:
        ValueError: a loss does so, and the probe cannot follow it.
    """
    tasks = step.tasks
    by_task = isinstance(losses, TaskLosses)
    outputs = losses.values if isinstance(losses, TaskLosses) else losses.outputs
    if not follows and any(isinstance(tensor, nn.Parameter) for tensor in shared.originals):
        raise ValueError(PARAMETERS)
    own = dict(enumerate([shared.leaves] if views is None else views))
    found = depends_on(
        outputs, {**own, _OUTSIDE: shared.originals}, shared.originals, parameters=crossed or follows
    )
    pair: tuple[str, str] | None = None
    past = False
    for task, keys in enumerate(found):
        whose = f"the loss of task {tasks[task]!r}" if by_task else "the loss of a sample"
        inside = {key for key in keys if isinstance(key, int) and key != _OUTSIDE}
        beside = Past.INSIDE in keys or (Past.PARAMETER in keys and (crossed or follows))
        if crossed and (beside or _OUTSIDE in keys):
            beside = True
            if not follows:
                raise ValueError(differentiates(whose))
        elif _OUTSIDE in keys:
            raise ValueError(
                f"{whose} depends on the features other than through the argument of its function, so its "
                "gradient there cannot be measured: write balancer(z, {task: lambda z: ...}) and use that z"
            )
        elif Past.INSIDE in keys and (inside or Past.PARAMETER in keys) and not follows:
            raise ValueError(reads_inside(whose))
        past = past or beside
        if not inside and not (beside and follows):
            tell_unconnected(whose, task, outputs[task], losses, step)
        if by_task and views is not None and pair is None and inside - {task}:
            pair = tasks[task], tasks[min(inside - {task})]
    return pair, past


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
        return torch.full((), first is not second, device=device)
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

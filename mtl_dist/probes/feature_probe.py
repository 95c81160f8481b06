"""FeatureProbe: every task's gradient at the shared features, before the backward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mtl_dist.probes._base import Exchange, Probe
from mtl_dist.probes._features import Features, anchored, gradient_gram, split
from mtl_dist.probes._losses import Heads, TaskLosses, evaluate
from mtl_dist.probes._replay import replayed


@dataclass(frozen=True)
class FeatureProbe(Probe):
    """Measures `g_i = ∂l_i/∂z` inside the forward, by n activation-only passes back through the heads.

    The weights are known before the backward and reach heads and trunk alike: the engine differentiates
    `Σ α_i s_i l_i`. Gradients are taken of the unscaled local losses, so loss scale and gradient
    accumulation never enter. The Gram at z is that of the representation (the "UB" of Sener and Koltun,
    NeurIPS 2018), not of the parameters: it leaves out the trunk's Jacobian.

    Attributes:
        reevaluate: evaluate the heads a second time for the backward, on the same random state, instead of
            keeping their graph. For engines that free parameters after their first use (ZeRO-3). Buffers of
            modules (batch statistics) are put back between the two, so they change once; other state that a
            head keeps in Python attributes changes twice. Losses that differ between the two evaluations
            are refused.
    """

    reevaluate: bool = False

    def __call__(self, features: Any, heads: Heads, exchange: Exchange) -> Tensor:
        """`Σ α_i s_i l_i`, one collective."""
        measured = self._measured_apart(features, heads, exchange) if self.reevaluate else None
        shared = split(features, detach=False)
        losses = _losses(shared, heads, exchange)
        gram: Tensor | None = None
        if measured is not None:
            first, gram = measured
            _check_same(first, losses, exchange)
        elif exchange.measure:
            gram = _gram(shared, losses)
        reduced = exchange.reduce(losses.stats(gram))
        weights = exchange.decide(reduced)
        total = losses.total(weights * reduced.shares)
        return total if losses.any_present else anchored(total, shared.leaves)

    def _measured_apart(
        self, features: Any, heads: Heads, exchange: Exchange
    ) -> tuple[TaskLosses, Tensor] | None:
        """Losses and Gram of an evaluation that leaves no trace; None where nothing is to be measured."""
        if not exchange.measure:
            return None
        probe = split(features, detach=True)
        with replayed(leaf.device for leaf in probe.leaves):
            losses = _losses(probe, heads, exchange)
            return losses, _gram(probe, losses)


def _losses(shared: Features, heads: Heads, exchange: Exchange) -> TaskLosses:
    losses = evaluate(heads, shared.rebuild(shared.leaves), exchange.tasks)
    return exchange.collect(losses, shared.leaves[0].device)


def _gram(shared: Features, losses: TaskLosses) -> Tensor:
    """`[n, n]`, `⟨g_i, g_j⟩`; zero rows for tasks that are absent or do not depend on the features."""
    rows = [
        # the graph is kept for the engine's backward, and ends at the features: the trunk is not entered
        torch.autograd.grad(value, shared.leaves, retain_graph=True, allow_unused=True)
        if value is not None and value.requires_grad
        else [None] * len(shared.leaves)
        for value in losses.values
    ]
    return gradient_gram(rows, losses.counts.device)


def _check_same(first: TaskLosses, second: TaskLosses, exchange: Exchange) -> None:
    """Both evaluations must give the same losses, up to the reordering of sums on accelerators."""
    for task, a, b in zip(exchange.tasks, first.values, second.values, strict=True):
        if a is None or b is None:
            differ = torch.tensor(a is not b)
        else:
            tolerance = torch.finfo(b.dtype).eps ** 0.5
            differ = (a.detach() - b.detach()).abs() > tolerance * a.detach().abs()
        exchange.watch(differ, partial(_not_reproducible, task, a, b))


def _not_reproducible(task: str, first: Tensor | None, second: Tensor | None) -> RuntimeError:
    values = [None if loss is None else loss.item() for loss in (first, second)]
    return RuntimeError(
        f"FeatureProbe(reevaluate=True): the head of task {task!r} gave {values[0]} and then {values[1]} on "
        "the same features and random state; it must not depend on state that changes from call to call. "
        "Use FeatureProbe() or FeatureTap() where the engine allows it"
    )

"""lag=1: weights that are known before the heads run, and gradients measured as they pass in the backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_dist.losses import (
    FeatureGradients,
    Features,
    Heads,
    LocalLosses,
    SampleLosses,
    TaskLosses,
    anchored,
    split,
)
from mtl_dist.probes.base import LaggedStep
from mtl_dist.probes.guards import protect
from mtl_dist.probes.passage import Rows, branch, rooted
from mtl_dist.probes.pipeline import look, losses_at

# From gradients at the features to this rank's part of the Gram, and the tasks in which it saw a NaN.
ToGram = Callable[[FeatureGradients], tuple[Tensor, Tensor | None]]


def lagged(
    features: Any,
    heads: Heads,
    step: LaggedStep,
    *,
    weighs_heads: bool = True,
    to_gram: ToGram | None = None,
) -> Tensor:
    """`Σ α_i s_i l_i` with the weights from before this step, whose one backward also measures.

    A weight of zero would hide the gradient of its task. So in a step that measures, the heads receive at
    least 2⁻¹⁰ of the largest weight, and the trunk's part is corrected where the gradient passes: the trunk
    receives exactly `Σ α_i s_i g_i`.

    Args:
        features: as for a probe.
        heads: whose gradients arrive apart: one function per task, or losses of samples.
        step: this step.
        weighs_heads: whether the weights reach the heads too; False: the convention of `FeatureTap`.
        to_gram: from the gradients at the features to the Gram; None: their own.

    Raises:
        ValueError: a loss depends on what another head computed, or on the features past its argument.
    """
    shared = split(features, detach=False)
    if weighs_heads and not step.measure:
        plain, _ = losses_at(shared, heads, step)
        total = plain.total(step.coefficients(plain))
        step.send(plain.stats())
        return total if total.requires_grad else anchored(total, shared.leaves)
    passage = _Lagged(step, to_gram or _at_features)
    branches = branch(passage, shared, len(step.tasks) if heads.separable else 1)
    if heads.separable:
        losses: LocalLosses = heads.on_views(branches)
    else:
        losses = heads.at(branches.copies[0], shared.leaves[0].device)
    if step.measure:
        _check_apart(losses, branches.views, shared, step)
    if isinstance(losses, TaskLosses) and losses.known is None:
        protect(losses, branches.views)
    passage.begin(losses, weighs_heads=weighs_heads)
    total = losses.total(_times(passage.root_weights, passage.shares))
    if not weighs_heads:
        return rooted(total, branches, passage)
    with torch.no_grad():
        value = losses.total(_times(passage.weights, passage.shares))
    return rooted(total, branches, passage, value)


def _at_features(gradients: FeatureGradients) -> tuple[Tensor, None]:
    return gradients.gram(), None


def _times(weights: Tensor, shares: Tensor | None) -> Tensor:
    return weights if shares is None else weights * shares


def _check_apart(losses: LocalLosses, views: Any, shared: Features, step: LaggedStep) -> None:
    pair, _ = look(losses, views if isinstance(losses, TaskLosses) else None, shared, step)
    if pair is not None:
        raise ValueError(
            f"the loss of task {pair[0]!r} depends on what the head of task {pair[1]!r} computed from the "
            "features, and with lag=1 the gradients of the two arrive as one. Let every head compute what it "
            "needs, give one function for all tasks, balancer(z, lambda z: {...}), or lag=0"
        )


@dataclass
class _Lagged:
    """What the backward of one call must know about its forward.

    Attributes:
        step: of the call.
        to_gram: of the probe.
        scale: what the scalar is differentiated with; None before the backward.
    """

    step: LaggedStep
    to_gram: ToGram
    scale: Tensor | None = None

    def begin(self, losses: LocalLosses, *, weighs_heads: bool) -> None:
        """Takes the losses, and decides what they are multiplied with."""
        if not weighs_heads:
            ratio = self.weights = self.step.weights(losses)
            self.root_weights = torch.ones_like(self.weights)
        else:
            self.weights, self.root_weights, ratio = self.step.visible_weights(losses)
        self.shares, self._unit = self.step.shares(losses)
        self._local = losses.stats()
        self._all_count = isinstance(losses, TaskLosses) and losses.all_count
        self._owner = losses.rows if isinstance(losses, SampleLosses) else None
        self._ratio = ratio.unbind() if self._owner is None else [ratio[self._owner]]
        self._is_sent = not self.step.measure
        if self._is_sent:
            self.step.send(self._local)

    def receive(self, rows: Rows) -> Sequence[Tensor]:
        """Measures the gradients, which arrive as `scale β_i s_i g_i`, and sends the statistics."""
        if not self._is_sent:
            self._is_sent = True
            self._measure(rows)
        elif self.step.measure:
            raise RuntimeError(
                "lag=1: a second backward through the same step, whose gradients were measured in the first "
                "one. Call backward once per step (retain_graph is not supported here)"
            )
        return self._ratio

    def _measure(self, rows: Rows) -> None:
        assert self.scale is not None
        # c_i / (scale β_i s_i)
        factors = self._unit / (self.root_weights * self.scale)
        if self._owner is None:
            gradients = FeatureGradients(rows, factors, all_count=self._all_count)
        else:
            gradients = FeatureGradients(rows, self._unit, self._owner, row_factors=factors)
        gram, faulty = self.to_gram(gradients)
        self.step.send(self._local.with_gram(gram), faulty, self.scale)

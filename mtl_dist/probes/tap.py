"""FeatureTap: the weights enter at the shared features, inside the engine's one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_dist.losses import Features, Heads, TaskLosses, Views, gradient_gram, split
from mtl_dist.probes.base import LaggedStep, Probe, ProbeMemory, Reduced, StepContext
from mtl_dist.probes.guards import protect
from mtl_dist.probes.lagged import lagged
from mtl_dist.probes.passage import Rows, branch, rooted
from mtl_dist.probes.pipeline import look
from mtl_dist.stats import LocalStats


@dataclass(frozen=True)
class FeatureTap(Probe):
    """Measures `g_i = ∂l_i/∂z` when they arrive in the backward, and passes `Σ α_i g_i` on to the trunk.

    It needs no extra pass. In return:

    * The weights reach the trunk only: each head keeps its own unweighted gradient (the convention of
      LibMTL and of TorchJD's `mtl_backward`), and the scalar's value is the unweighted sum of the losses.
    * The weights of a step are known after its backward, and so is `balancer.report`.
    * There are two collectives per step: losses and counts in the forward, the Gram in the backward.
    * `heads` must be a mapping, because one function for all tasks gives one gradient for all of them. Heads
      that share what one of them computed from the features are refused for the same reason.

    The gradient that the scalar receives shows the loss scale and the accumulation factor; both are divided
    out.

    Raises:
        TypeError: `heads` is not a mapping.
        ValueError: a loss depends on what another head computed, or on the features past its argument.
    """

    at_features: ClassVar[bool] = True

    def memory(self) -> _Order:
        """The order of forwards and backwards."""
        return _Order()

    def __call__(self, features: Any, heads: Heads, step: StepContext) -> Tensor:
        """`Σ s_i l_i`, whose backward is weighted at the features."""
        if not heads.separable:
            raise TypeError(
                "FeatureTap needs heads as a mapping with one function per task, because one function for "
                "all tasks gives one gradient for all; use FeatureProbe() for a shared function"
            )
        shared = split(features, detach=False)
        order: _Order = step.memory
        tap = _TapStep(step, shared.leaves[0].device, order.next_number(), order)
        branches = branch(tap, shared, len(step.tasks))
        losses = heads.on_views(branches)
        assert isinstance(losses, TaskLosses)  # separable heads give losses by task
        if step.measure:
            _check_apart(losses, branches.views, shared, step)
        if losses.known is None:
            protect(losses, branches.views)
        tap.begin(step.reduce(losses.stats()))
        return rooted(losses.total(tap.forward.shares), branches, tap)

    def lagged(self, features: Any, heads: Heads, step: LaggedStep) -> Tensor:
        """`Σ s_i l_i`, whose backward is weighted at the features by weights that are known already."""
        return lagged(features, heads, step, weighs_heads=False)


def _check_apart(losses: TaskLosses, views: Views, shared: Features, step: StepContext) -> None:
    pair, _ = look(losses, views, shared, step)
    if pair is not None:
        raise ValueError(
            f"FeatureTap: the loss of task {pair[0]!r} depends on what the head of task {pair[1]!r} computed "
            "from the features, and the gradients of the two arrive as one. Use FeatureProbe(), which "
            "separates them"
        )


class _Order(ProbeMemory):
    """The order of forwards and of their backwards."""

    def __init__(self) -> None:
        self._forwards = 0
        self._last = 0

    def next_number(self) -> int:
        """The number of a new forward, from 1."""
        self._forwards += 1
        return self._forwards

    def note_backward(self, number: int) -> bool:
        """Whether a later forward had its backward before this one."""
        late = number < self._last
        self._last = max(self._last, number)
        return late


@dataclass
class _TapStep:
    """What the backward of one step must know about its forward."""

    step: StepContext
    device: torch.device
    number: int
    order: _Order
    reduced: Reduced | None = None
    weights: Tensor | None = None
    scale: Tensor | None = None

    @property
    def forward(self) -> Reduced:
        assert self.reduced is not None
        return self.reduced

    def begin(self, reduced: Reduced) -> None:
        """Takes the losses and counts of all ranks. Without a measurement the rule decides here."""
        self.reduced = reduced
        if not self.step.measure:
            self.weights = self.step.decide(reduced)

    def receive(self, rows: Rows) -> Sequence[Tensor]:
        """The weights, once the gradient of every task has arrived."""
        if self.weights is None:
            if self.order.note_backward(self.number) and self.step.stateful:
                raise RuntimeError(
                    "FeatureTap: of two forwards before one backward the second one updated the rule first, "
                    "because a backward runs in reverse order: call backward after each forward, or use "
                    "FeatureProbe()"
                )
            gram = self._local_gram(rows)
            zeros = gram.new_zeros(len(gram))
            # with a factor of 0 nothing can be measured, and no task is to blame
            faulty = ~gram.diagonal().isfinite() & (self.scale != 0)
            later = self.step.reduce(LocalStats(zeros, zeros, gram), faulty)
            self.weights = self.step.decide(self.forward.with_gram(later))
        elif self.step.measure:
            raise RuntimeError(
                "FeatureTap: a second backward through the same step; the weights belong to the first one. "
                "Call backward once per step (retain_graph is not supported here)"
            )
        return self.weights.unbind()

    def _local_gram(self, rows: Rows) -> Tensor:
        """`c_i c_j ⟨g_i, g_j⟩` from gradients that arrive as `scale s_i g_i`, with `s_i = W c_i / C_i`."""
        assert self.scale is not None
        received = gradient_gram(rows, self.device)
        # c_i / (scale s_i)
        scale = self.scale.to(self.forward.shares.dtype)
        factor = self.forward.total.counts / (self.forward.world_size * scale)
        factor = torch.where(self.forward.shares > 0, factor, torch.zeros_like(factor))
        return received * torch.outer(factor, factor)

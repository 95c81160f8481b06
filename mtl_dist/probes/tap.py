"""FeatureTap: the weights enter at the shared features, inside the engine's one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_dist.losses import Branches, Features, Heads, TaskLosses, Views, gradient_gram, split
from mtl_dist.probes.base import Probe, Reduced, StepContext
from mtl_dist.probes.guards import protect
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
        anchor, branches = tap.branch(shared)
        losses = heads.on_views(branches)
        assert isinstance(losses, TaskLosses)  # separable heads give losses by task
        if step.measure:
            _check_apart(losses, branches.views, shared, step)
        if not losses.counts_on_host:
            protect(losses, branches.views)
        tap.begin(step.reduce(losses.stats()))
        total = losses.total(tap.forward.shares)
        # the anchor brings the backward, and its collective, to ranks where no task is present
        root: Tensor = _Root.apply(total + anchor.to(total.dtype), tap)  # type: ignore[no-untyped-call]
        return root


def _check_apart(losses: TaskLosses, views: Views, shared: Features, step: StepContext) -> None:
    pair, _ = look(losses, views, shared, step)
    if pair is not None:
        raise ValueError(
            f"FeatureTap: the loss of task {pair[0]!r} depends on what the head of task {pair[1]!r} computed "
            "from the features, and the gradients of the two arrive as one. Use FeatureProbe(), which "
            "separates them"
        )


class _Order:
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

    def branch(self, shared: Features) -> tuple[Tensor, Branches]:
        """A scalar zero, and branches of the features whose gradients come back together."""
        n, m = len(self.step.tasks), len(shared.leaves)
        anchor, *views = _Tap.apply(self, n, *shared.leaves)  # type: ignore[no-untyped-call]
        return anchor, shared.with_views([views[i * m : (i + 1) * m] for i in range(n)])

    def begin(self, reduced: Reduced) -> None:
        """Takes the losses and counts of all ranks. Without a measurement the rule decides here."""
        self.reduced = reduced
        if not self.step.measure:
            self.weights = self.step.decide(reduced)

    def decide(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """`[n]` weights, once the gradient of every task has arrived."""
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
        return self.weights

    def _local_gram(self, rows: Sequence[Sequence[Tensor | None]]) -> Tensor:
        """`c_i c_j ⟨g_i, g_j⟩` from gradients that arrive as `scale s_i g_i`, with `s_i = W c_i / C_i`."""
        assert self.scale is not None
        received = gradient_gram(rows, self.device)
        # c_i / (scale s_i)
        factor = self.forward.total.counts / (self.forward.world_size * self.scale)
        factor = torch.where(self.forward.shares > 0, factor, torch.zeros_like(factor))
        return received * torch.outer(factor, factor)


class _Tap(torch.autograd.Function):
    """A zero and n views of every leaf forward; the weighted sum of the views' gradients backward."""

    @staticmethod
    def forward(ctx: Any, step: _TapStep, num_tasks: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.num_tasks = step, num_tasks
        ctx.like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        ctx.set_materialize_grads(False)
        views = (leaf.view_as(leaf) for _ in range(num_tasks) for leaf in leaves)
        return leaves[0].new_zeros((), dtype=torch.float32), *views  # a leaf may be complex

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        m = len(gradients) // ctx.num_tasks
        rows = [gradients[i * m : (i + 1) * m] for i in range(ctx.num_tasks)]
        if ctx.step.reduced is None:
            raise ValueError(
                "FeatureTap: a head takes a derivative with respect to something before the features (a PDE "
                "residual, a gradient penalty), and the tap weighs every gradient that passes there. Use "
                "ParameterProbe(), or a rule that reads losses only"
            )
        weights = ctx.step.decide(rows)
        sums = (_weighted_sum(weights, leaf) for leaf in zip(*rows, strict=True))
        # zeros, not None, where no task is present: engines wait for every trunk parameter
        return None, None, *(_or_zeros(s, like) for s, like in zip(sums, ctx.like, strict=True))


class _Root(torch.autograd.Function):
    """Identity that reads the factor (loss scale, 1 / accumulation) its scalar is differentiated with."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, step: _TapStep) -> Tensor:
        ctx.step = step
        return total.view_as(total)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.step.scale = gradient.to(ctx.step.forward.shares.dtype)
        return gradient, None


def _or_zeros(gradient: Tensor | None, like: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient


def _weighted_sum(weights: Tensor, gradients: Sequence[Tensor | None]) -> Tensor | None:
    """`Σ α_i g_i` of one leaf."""
    total: Tensor | None = None
    for weight, gradient in zip(weights, gradients, strict=True):
        if gradient is not None:
            term = weight * gradient  # a scalar keeps the gradient's dtype
            total = term if total is None else total.add_(term)
    return total

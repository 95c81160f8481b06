"""Gradients as they pass the shared features in the engine's one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mtl_dist.losses import Branches, Features, Gradients

Rows = Sequence[Gradients]


class Passage(Protocol):
    """What happens where the gradients of one call pass.

    Attributes:
        scale: the gradient of the scalar: loss scale and accumulation; None before the backward.
    """

    scale: Tensor | None

    def receive(self, rows: Rows) -> Sequence[Tensor]:
        """Takes the gradients that arrived, and returns what the trunk receives of each set.

        Args:
            rows: for each view, one gradient per leaf; None for zero.

        Returns:
            A factor for each set, which can be multiplied with its gradients.
        """
        ...


def branch(passage: Passage, shared: Features, num_views: int) -> Branches:
    """Views of the features whose gradients come back together."""
    m = len(shared.leaves)
    views: Sequence[Tensor]
    views = _Pass.apply(passage, num_views, *shared.leaves)  # type: ignore[no-untyped-call]
    return shared.with_views([views[i * m : (i + 1) * m] for i in range(num_views)])


def rooted(total: Tensor, branches: Branches, passage: Passage, value: Tensor | None = None) -> Tensor:
    """`total`, whose backward tells the passage the factor that it is differentiated with.

    The backward also comes to the features where no task is present, as on the other ranks.

    Args:
        total: what is differentiated.
        branches: what the losses were computed from.
        passage: to be told.
        value: what the result shows; None: the total.
    """
    shown = total if value is None else value
    anchor = branches.views[0][0]
    root: Tensor = _Root.apply(total, anchor, shown.detach(), passage)  # type: ignore[no-untyped-call]
    return root


class _Pass(torch.autograd.Function):
    """Several views of every leaf forward; the weighted sum of their gradients backward."""

    @staticmethod
    def forward(ctx: Any, passage: Passage, num_views: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.passage, ctx.num_views = passage, num_views
        ctx.like = [(leaf.shape, leaf.dtype, leaf.device) for leaf in leaves]
        ctx.set_materialize_grads(False)
        return tuple([leaf.view_as(leaf) for _ in range(num_views) for leaf in leaves])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        m = len(gradients) // ctx.num_views
        rows = [gradients[i * m : (i + 1) * m] for i in range(ctx.num_views)]
        if ctx.passage.scale is None:
            raise ValueError(
                "a head takes a derivative with respect to something before the features (a PDE residual, a "
                "gradient penalty), and every gradient that passes at the features is weighed. Use "
                "ParameterProbe(), or a rule that reads losses only"
            )
        factors = ctx.passage.receive(rows)
        sums = (_weighted_sum(factors, leaf) for leaf in zip(*rows, strict=True))
        # zeros, not None, where no task is present: engines wait for every trunk parameter
        return None, None, *(_or_zeros(s, like) for s, like in zip(sums, ctx.like, strict=True))


class _Root(torch.autograd.Function):
    """Identity that reads the factor (loss scale, 1 / accumulation) its scalar is differentiated with."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, anchor: Tensor, value: Tensor, passage: Passage) -> Tensor:
        ctx.passage = passage
        return value.clone()  # FSDP2 warns of modules that return a view

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        ctx.passage.scale = gradient
        return gradient, None, None, None


def _or_zeros(gradient: Tensor | None, like: tuple[torch.Size, torch.dtype, torch.device]) -> Tensor:
    shape, dtype, device = like
    return torch.zeros(shape, dtype=dtype, device=device) if gradient is None else gradient


def _weighted_sum(factors: Sequence[Tensor], gradients: Gradients) -> Tensor | None:
    """`Σ f_i g_i` of one leaf."""
    total: Tensor | None = None
    for factor, gradient in zip(factors, gradients, strict=True):
        if gradient is not None:
            if factor.dim():  # of the rows: one factor for each sample
                factor = factor.reshape(*factor.shape, *[1] * (gradient.dim() - factor.dim()))
            # a factor in the gradient's own precision would be rounded; scalars keep the gradient's dtype
            factor = factor.to(gradient.dtype) if factor.dim() else factor
            total = factor * gradient if total is None else total.addcmul_(factor, gradient)
    return total

"""The shared features as a list of leaves, and features that are still the input of a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # no public name yet in torch 2.13

Views = Sequence[Sequence[Tensor]]  # [task][leaf of the features]


@dataclass(frozen=True)
class Branches:
    """The features once for each task, each with views of its own.

    A loss that depends on no other views shows its gradient at its own, in one pass for all tasks.

    Attributes:
        views: of the leaves, for each task.
        copies: the features for each task: the pytree with the task's views in place of its leaves.
    """

    views: Views
    copies: Sequence[Any]


@dataclass(frozen=True)
class LayerInput:
    """Features that still have to go through the last shared layer.

    Attributes:
        layer: linear layer or convolution, without an activation of its own.
        input: what the layer is called with.
    """

    layer: Callable[[Any], Any]
    input: Any


@dataclass(frozen=True)
class Features:
    """Any pytree of tensors, split into the leaves where gradients are taken and the rest.

    Attributes:
        leaves: floating-point tensors, each requires gradients.
        spec: structure to rebuild the pytree.
        flat: all leaves of the pytree.
        positions: where `leaves` are in `flat`.
        originals: the tensors that were given, one for each of `leaves`.
        branches: views of the leaves for each task, if they were asked for.
    """

    leaves: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    flat: tuple[Any, ...]
    positions: tuple[int, ...]
    originals: tuple[Tensor, ...]
    branches: Branches | None = None

    def rebuild(self, leaves: Sequence[Tensor] | None = None) -> Any:
        """The pytree with `leaves` (None: its own leaves) in place of its floating-point tensors."""
        flat = list(self.flat)
        for position, leaf in zip(self.positions, leaves or self.leaves, strict=True):
            flat[position] = leaf
        return pytree.tree_unflatten(flat, self.spec)

    def with_views(self, views: Views) -> Branches:
        """The features once for each task, with the given views of their leaves."""
        return Branches(views, [self.rebuild(own) for own in views])


def split(features: Any, *, detach: bool, num_branches: int = 0) -> Features:
    """The floating-point leaves of a pytree, ready to take gradients at.

    Args:
        features: tensor or pytree of tensors. Anything else in it is passed through.
        detach: cut the leaves off the graph that made them. Leaves of a frozen trunk are always cut off.
        num_branches: number of tasks for which each leaf gets a view of its own; 0: none.

    Raises:
        ValueError: no floating-point tensor in `features`.
    """
    flat, spec = pytree.tree_flatten(features)
    positions = tuple([i for i, leaf in enumerate(flat) if _is_floating(leaf)])
    if not positions:
        raise ValueError(
            f"features must hold a floating-point tensor to measure gradients at, got {features!r}"
        )
    tensors = tuple([flat[position] for position in positions])
    leaves = tuple([_cut_off(t) if detach or not t.requires_grad else _one_node_on(t) for t in tensors])
    shared = Features(leaves, spec, tuple(flat), positions, tensors)
    if not num_branches:
        return shared
    views = [[leaf.view_as(leaf) for leaf in leaves] for _ in range(num_branches)]
    return replace(shared, branches=shared.with_views(views))


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _cut_off(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _one_node_on(tensor: Tensor) -> Tensor:
    """The same values, one node further in the graph, where no engine has put a hook.

    A gradient taken at the very output of a module that FSDP2 wrapped fires its pre-backward hook. FSDP2 then
    frees all parameters at the end of that gradient, including those of the other tasks' heads.
    """
    return tensor.view_as(tensor)


def anchored(total: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """`total` with a zero gradient at every leaf, so that a rank without any task still runs a backward."""
    result: Tensor = _Anchor.apply(total, *leaves)  # type: ignore[no-untyped-call]
    return result


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return total.view_as(total)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(leaf) for leaf in ctx.saved_tensors)

"""The shared features as a list of leaves, and features that are still the input of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree  # no public name yet in torch 2.13

# Values in a pytree that hold no tensor
_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, type, Enum, range, slice,
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator,
)  # fmt: skip

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
class Called:
    """A linear layer that the model has called already, in the place of `LayerInput.layer`.

    What the model adds to its output (an adapter beside a frozen weight) does not count: the gradient of the
    weight follows from the gradient at `output` alone.

    Attributes:
        output: what it gave for the input.
    """

    output: Tensor

    def __call__(self, _: Any) -> Tensor:
        """The output."""
        return self.output


@dataclass(frozen=True)
class Features:
    """Any pytree of tensors, split into the leaves where gradients are taken and the rest.

    Attributes:
        leaves: floating-point or complex tensors, each requires gradients.
        spec: structure to rebuild the pytree.
        flat: all leaves of the pytree.
        positions: for each of `leaves`, where it is in `flat`; a tensor may be there several times.
        originals: the tensors that were given, one for each of `leaves`.
        branches: views of the leaves for each task, if they were asked for.
    """

    leaves: tuple[Tensor, ...]
    spec: pytree.TreeSpec
    flat: tuple[Any, ...]
    positions: tuple[Sequence[int], ...]
    originals: tuple[Tensor, ...]
    branches: Branches | None = None

    def rebuild(self, leaves: Sequence[Tensor] | None = None) -> Any:
        """The pytree with `leaves` (None: its own leaves) in place of its floating-point tensors."""
        flat = list(self.flat)
        for positions, leaf in zip(self.positions, leaves or self.leaves, strict=True):
            for position in positions:
                flat[position] = leaf
        return pytree.tree_unflatten(flat, self.spec)

    def with_views(self, views: Views) -> Branches:
        """The features once for each task, with the given views of their leaves."""
        return Branches(views, [self.rebuild(own) for own in views])


def split(features: Any, *, detach: bool, num_branches: int = 0) -> Features:
    """The tensors of a pytree that gradients are taken at, ready for that.

    Data beside the features is passed through: tensors without a graph, where others have one. Nothing that
    is trained lies behind it. Without any graph (a frozen trunk), all floating-point tensors are features.

    Args:
        features: tensor or pytree of tensors and plain values.
        detach: cut the leaves off the graph that made them. Leaves of a frozen trunk are always cut off.
        num_branches: number of tasks for which each leaf gets a view of its own; 0: none.

    Raises:
        ValueError: no floating-point tensor in `features`, an object whose tensors cannot be seen, two views
            of one tensor, or a DTensor.
    """
    flat, spec = pytree.tree_flatten(features)
    places = _places(flat)
    if not places:
        raise ValueError(
            f"features must hold a floating-point tensor to measure gradients at, got {features!r}"
        )
    positions = tuple(places.values())
    tensors = tuple([flat[where[0]] for where in positions])
    leaves = tuple([_cut_off(t) if detach or not t.requires_grad else _one_node_on(t) for t in tensors])
    shared = Features(leaves, spec, tuple(flat), positions, tensors)
    if not num_branches:
        return shared
    views = [[leaf.view_as(leaf) for leaf in leaves] for _ in range(num_branches)]
    return replace(shared, branches=shared.with_views(views))


def _places(flat: Sequence[Any]) -> dict[int, list[int]]:
    """Where each tensor with gradients is in `flat`, by its identity."""
    places: dict[int, list[int]] = {}
    for position, leaf in enumerate(flat):
        if isinstance(leaf, Tensor):
            if leaf.is_floating_point() or leaf.is_complex():
                if hasattr(leaf, "placements"):
                    raise explain_placed("a feature", leaf)
                places.setdefault(id(leaf), []).append(position)
        elif not isinstance(leaf, _PLAIN) and type(leaf).__module__ != "numpy":
            raise ValueError(
                f"features hold a {type(leaf).__name__}, whose tensors cannot be seen: give tensors, in "
                "tuples, lists and dicts, or make the class known by torch.export.register_dataclass"
            )
    if len(places) > 1:
        places = _without_data(places, flat)
        _check_distinct([flat[where[0]] for where in places.values()])
    return places


def explain_placed(what: str, tensor: Any) -> ValueError:
    """The error for a DTensor (it has `placements`), whose ranks the balancer's group need not have."""
    return ValueError(
        f"{what} is a DTensor of placements {tensor.placements}, and the balancer takes the plain tensor "
        "that all ranks of that mesh have in common: give x.full_tensor(), and as group= the data-parallel "
        "ranks alone"
    )


def _without_data(places: dict[int, list[int]], flat: Sequence[Any]) -> dict[int, list[int]]:
    """The places of tensors that a graph made, or of parameters; all, where there are none."""
    made = {
        key: where
        for key, where in places.items()
        if flat[where[0]].grad_fn is not None or isinstance(flat[where[0]], nn.Parameter)
    }
    return made or places


def _check_distinct(tensors: Sequence[Tensor]) -> None:
    """Raises `ValueError` for the same numbers twice: gradients at the two would seem to be orthogonal."""
    seen: set[tuple[Any, ...]] = set()
    for tensor in tensors:
        base = tensor if tensor._base is None else tensor._base
        key = id(base), tensor.storage_offset(), tensor.numel()
        if key in seen and tensor.numel() > 0:
            raise ValueError(
                "features hold two views of the same numbers, of shape "
                f"{tuple(tensor.shape)} the second: give the tensor once, and let the heads make the views"
            )
        seen.add(key)


def _cut_off(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _one_node_on(tensor: Tensor) -> Tensor:
    """The same values, one node further in the graph, where no engine has put a hook.

    A gradient taken at the very output of a module that FSDP2 wrapped fires its pre-backward hook. FSDP2 then
    frees all parameters at the end of that gradient, including those of the other tasks' heads.
    """
    return tensor.view_as(tensor)


CHANGED = (
    "a head changed the features in place (nn.ReLU(inplace=True) first?): the other heads would read the "
    "changed values, and no gradient at the features would belong to one task; use the form out of place"
)


@contextmanager
def unchanged(features: Any) -> Iterator[None]:
    """Heads run in the block.

    Raises:
        ValueError: one of them changed the features in place.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(features) if isinstance(leaf, Tensor)]
    # tensors of the inference mode count no versions
    before = [t.clone() if t.is_inference() else t._version for t in tensors]
    yield
    for tensor, then in zip(tensors, before, strict=True):
        same = torch.equal(tensor, then) if isinstance(then, Tensor) else tensor._version == then
        if not same:
            raise ValueError(CHANGED)


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

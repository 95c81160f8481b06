"""FSDP2's insides: its units of parameters, around gradients that are taken before its backward.

FSDP2 treats the end of any gradient as the end of the step's backward. It then frees parameters that it meant
to keep until the backward, and forgets in which order it wanted to gather the others ahead of their use. The
backward would gather all of them again: the result is right, but slow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mtl_dist.engines.graph import nodes

_LOGGER = logging.getLogger("mtl_dist")
T = TypeVar("T")

UNIT_NODE = "RegisterPostBackwardFunctionBackward"  # FSDP2 puts this node at the inputs of each of its units


@dataclass(frozen=True)
class Units:
    """Everything that FSDP2 shards below one root.

    Attributes:
        context: what they have in common.
        groups: of parameters that are gathered and freed together.
        kept: groups of the heads that stay gathered from such a gradient until the backward, which needs them
            first. Empty if they are larger than the largest group, for which FSDP2 has room in any case.
    """

    context: Any
    groups: tuple[Any, ...]
    kept: tuple[Any, ...]

    @contextmanager
    def undisturbed(self, given: T) -> Iterator[T]:
        """FSDP2 still expects its backward after the block, which receives `given`.

        Units stay gathered if they were, or if they are `kept`.
        """
        context = self.context
        before = context.is_last_backward, context.iter_forward_root
        orders = [(group, group._post_forward_indices) for group in self.groups]
        prefetched = [(state, state._states_to_backward_prefetch) for state in context.all_states]
        gathered = [
            group
            for group in self.groups
            if group.reshard_after_backward and (group.is_unsharded or group in self.kept)
        ]
        context.is_last_backward = False
        for group in gathered:
            group.reshard_after_backward = False
        for group, _ in orders:  # nothing is gathered ahead: this gradient ends at the features
            group._post_forward_indices = []
        for state, _ in prefetched:
            state._states_to_backward_prefetch = []
        try:
            yield given
        finally:
            context.is_last_backward, context.iter_forward_root = before
            for group in gathered:
                group.reshard_after_backward = True
            for group, order in orders:
                group._post_forward_indices = order
            for state, states in prefetched:
                state._states_to_backward_prefetch = states

    def release(self) -> None:
        """Frees the heads' groups that no backward has freed: the optimizer may have taken a step since."""
        for group in self.kept:
            if group.is_unsharded and group.reshard_after_backward:
                group.reshard()


def find_units(losses: Sequence[Tensor], features: Sequence[Tensor]) -> Units | None:
    """The units in the graph of some losses; None where there are none.

    FSDP2 has no public way to find them. Where its insides have other names than in torch 2.9 to 2.14, they
    are left alone, and a warning says so.

    Args:
        losses: of the heads.
        features: what the heads read, the leaves where gradients are taken.
    """
    ends = [leaf.grad_fn for leaf in features if leaf.grad_fn is not None]
    try:
        in_heads = _groups(losses, ends)
        return _all_units(in_heads, in_heads or _groups(features, ()))
    except AttributeError as error:
        _LOGGER.warning(
            "mtl_dist: FSDP2 of torch %s has other insides (%s). The weights are right, but FSDP2 gathers "
            "the heads' parameters twice per step",
            torch.__version__,
            error,
        )
        return None


def _groups(outputs: Sequence[Tensor], ends: Sequence[Any]) -> tuple[Any, ...]:
    behind = (node for output in outputs for node in nodes(output, ends))
    found = [node.param_group for node in behind if node.name() == UNIT_NODE]  # type: ignore[attr-defined]
    return tuple({id(group): group for group in found}.values())


def _all_units(in_heads: tuple[Any, ...], known: tuple[Any, ...]) -> Units | None:
    if not known:
        return None
    context = known[0].modules[0]._get_fsdp_state()._state_ctx
    groups = tuple(group for state in context.all_states for group in _groups_of(state))
    fits = sum(map(_size, in_heads)) <= max(map(_size, groups))
    units = Units(context, groups, in_heads if fits else ())
    with units.undisturbed(None):  # if an attribute is missing, the error comes here
        return units


def _groups_of(state: Any) -> tuple[Any, ...]:
    """The groups of one module: any number since torch 2.12, one or None before."""
    if hasattr(state, "_fsdp_param_groups"):
        return tuple(state._fsdp_param_groups)
    return () if state._fsdp_param_group is None else (state._fsdp_param_group,)


def _size(group: Any) -> int:
    return sum(parameter.sharded_param.numel() for parameter in group.fsdp_params)


def is_sharded(tensor: Any) -> bool:
    """Whether a parameter is a DTensor, as FSDP2 makes them."""
    return hasattr(tensor, "full_tensor")

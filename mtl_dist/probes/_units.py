"""FSDP2's units of parameters, around gradients that are taken in the forward, before its backward.

FSDP2 takes the end of any gradient for the end of the step's backward: it frees parameters that it meant to
keep until then, and throws away the order in which it would have gathered the others ahead of their use, with
what it had begun to gather. All would be gathered again in the backward: right, but slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mtl_dist._graph import nodes


@dataclass(frozen=True)
class Units:
    """Everything that FSDP2 shards below one root.

    Attributes:
        context: what they have in common.
        groups: of parameters that are gathered and freed together.
        held: groups of the heads that stay gathered from such a gradient until the backward, which needs them
            first: none if they are larger than the largest group, which FSDP2 has room for in any case.
    """

    context: Any
    groups: tuple[Any, ...]
    held: tuple[Any, ...]

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Leaves the units with a backward to come; gathered, if they were or are `held`."""
        context = self.context
        before = context.is_last_backward, context.iter_forward_root
        orders = [(group, group._post_forward_indices) for group in self.groups]
        prefetched = [(state, state._states_to_backward_prefetch) for state in context.all_states]
        kept = [
            group
            for group in self.groups
            if group.reshard_after_backward and (group.is_unsharded or group in self.held)
        ]
        context.is_last_backward = False
        for group in kept:
            group.reshard_after_backward = False
        for group, _ in orders:  # nothing is gathered ahead: this gradient ends at the features
            group._post_forward_indices = []
        for state, _ in prefetched:
            state._states_to_backward_prefetch = []
        try:
            yield
        finally:
            context.is_last_backward, context.iter_forward_root = before
            for group in kept:
                group.reshard_after_backward = True
            for group, order in orders:
                group._post_forward_indices = order
            for state, states in prefetched:
                state._states_to_backward_prefetch = states

    def release(self) -> None:
        """Frees the heads' groups that no backward has freed: the optimizer may have stepped since."""
        for group in self.held:
            if group.is_unsharded and group.reshard_after_backward:
                group.reshard()


class Fsdp:
    """The units of a balancer's model, found at its first gradient."""

    def __init__(self) -> None:
        self._looked = False
        self._units: Units | None = None

    def undisturbed(
        self, losses: Sequence[Tensor], features: Sequence[Tensor]
    ) -> AbstractContextManager[None]:
        """For gradients of losses at the features; FSDP2 is told that a backward is still to come."""
        if not self._looked and losses:
            self._looked, self._units = True, find_units(losses, features)
        return nullcontext() if self._units is None else self._units.undisturbed()

    def release(self) -> None:
        """Before heads are evaluated: frees what a step without a backward left gathered."""
        if self._units is not None:
            self._units.release()


def find_units(losses: Sequence[Tensor], features: Sequence[Tensor]) -> Units | None:
    """The units in the graph of some losses; None where there are none.

    FSDP2 has no public way to them. Where its insides have other names (torch < 2.13), they are left alone.

    Args:
        losses: of the heads.
        features: which the heads read, the leaves that gradients are taken at.
    """
    ends = [leaf.grad_fn for leaf in features if leaf.grad_fn is not None]
    in_heads = _groups(losses, ends)
    try:
        return _all_units(in_heads, in_heads or _groups(features, ()))
    except AttributeError:
        return None


def _groups(outputs: Sequence[Tensor], ends: Sequence[Any]) -> tuple[Any, ...]:
    found = (getattr(node, "param_group", None) for output in outputs for node in nodes(output, ends))
    return tuple({id(group): group for group in found if group is not None}.values())


def _all_units(in_heads: tuple[Any, ...], known: tuple[Any, ...]) -> Units | None:
    if not known:
        return None
    context = known[0].modules[0]._get_fsdp_state()._state_ctx
    groups = tuple(group for state in context.all_states for group in state._fsdp_param_groups)
    fits = sum(map(_size, in_heads)) <= max(map(_size, groups))
    units = Units(context, groups, in_heads if fits else ())
    with units.undisturbed():  # an AttributeError comes now or never
        return units


def _size(group: Any) -> int:
    return sum(parameter.sharded_param.numel() for parameter in group.fsdp_params)

"""Gradients of losses that do not count: exactly zero, and still on their way through the whole graph.

Multiplying a loss by 0 is not enough, because 0 times the NaN of a mean over nothing is NaN. Leaving the loss
out of the graph is too much: engines wait for the gradients of every head that ran (DDP, ZeRO), and for every
module that they sharded (FSDP2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node

Gradients = tuple[Tensor | None, ...]


def silence(idle: Iterable[Tensor], counted: Iterable[Tensor]) -> None:
    """Makes every gradient of the `idle` losses exactly zero.

    The nodes that only they use give zeros, whatever they compute. Nodes that a counted loss uses too are
    left alone, and receive these zeros. The hooks belong to the graph and end with it.
    """
    heard = set(_nodes(counted))
    for node in _nodes(idle, heard):
        if not hasattr(node, "variable"):  # the ends at leaves live longer than the graph
            node.register_hook(_zeros)


def silence_rows(losses: Tensor, hidden: Tensor) -> None:
    """Takes NaN and infinity out of the gradients of hidden samples, node by node, where they come from.

    Samples do not interact in the heads, so their rows stay apart until they meet in a parameter.

    Args:
        losses: of the samples.
        hidden: bool, in the shape of the losses; the samples that do not count.
    """
    clean = _cleaner(hidden)
    for node in _nodes([losses]):
        if not hasattr(node, "variable"):
            node.register_hook(clean)


def _nodes(losses: Iterable[Tensor], known: Iterable[Node] = ()) -> Iterator[Node]:
    pending: list[Node | None] = [loss.grad_fn for loss in losses]
    seen = set(known)
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending.extend(following for following, _ in node.next_functions)


def _zeros(gradients: Gradients, _: Gradients) -> Gradients:
    return tuple([None if gradient is None else torch.zeros_like(gradient) for gradient in gradients])


def _cleaner(hidden: Tensor) -> Callable[[Gradients, Gradients], Gradients]:
    """A hook that cleans gradients whose first dimensions are those of the samples, in any of their forms."""
    forms: dict[Sequence[int], Tensor] = {(hidden.numel(),): hidden.flatten()}
    for dims in range(1, hidden.dim() + 1):  # a row of several losses is hidden where all of them are
        forms[tuple(hidden.shape[:dims])] = (
            hidden.flatten(dims - 1).all(-1) if dims < hidden.dim() else hidden
        )

    def cleaned(gradient: Tensor | None) -> Tensor | None:
        if gradient is None or gradient.layout != torch.strided:
            return gradient
        for dims in range(min(hidden.dim(), gradient.dim()), 0, -1):
            rows = forms.get(tuple(gradient.shape[:dims]))
            if rows is not None:
                rows = rows.reshape(*rows.shape, *[1] * (gradient.dim() - rows.dim()))
                return torch.where(rows & ~gradient.isfinite(), torch.zeros_like(gradient), gradient)
        return gradient

    return lambda gradients, _: tuple([cleaned(gradient) for gradient in gradients])

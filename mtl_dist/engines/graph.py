"""Walks through the autograd graph."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import TypeVar

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]  # a node, and the number of its input where a gradient arrives
T = TypeVar("T")
# A parameter in another form is still a parameter: casts (autocast keeps them), transposes, views.
_FORMS = {"TBackward0", "ToCopyBackward0", "TransposeBackward0", "PermuteBackward0", "ViewBackward0"}


class Past(Enum):
    """What a loss reads of a trunk other than its output.

    Attributes:
        INSIDE: something that the trunk computed on its way.
        PARAMETER: one of the trunk's parameters itself, as a tied output head does.
    """

    INSIDE = 0
    PARAMETER = 1


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor arrives."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def accumulators(output: Tensor) -> Iterator[Node]:
    """The nodes behind `output` that add to the gradient of a leaf; the leaf is their `variable`."""
    return (node for node in nodes(output) if hasattr(node, "variable"))


def nodes(output: Tensor, ends: Iterable[Node] = ()) -> Iterator[Node]:
    """All nodes behind `output`, without those behind `ends`."""
    pending: list[Node | None] = [output.grad_fn]
    seen = set(ends)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def depends_on(
    outputs: Sequence[Tensor | None],
    starts: Mapping[T, Iterable[Tensor]],
    trunk: Sequence[Tensor] = (),
    *,
    parameters: bool = False,
) -> list[set[T | Past]]:
    """For each output, the keys of the tensors in its graph. What lies behind such a tensor is not searched.

    Args:
        outputs: tensors with or without a graph; None has none.
        starts: the tensors that are looked for, by any key.
        trunk: tensors whose graph is looked for too; found as `Past`, where no start lies between.
        parameters: look for the trunk's parameters even where nothing else of it is read. This walks through
            the whole trunk, in Python.
    """
    marks = {edge_of(t): key for key, tensors in starts.items() for t in tensors if t.requires_grad}
    if not parameters:
        # autograd counts its nodes: one that was made after the trunk's outputs is none of the trunk's
        made = [tensor.grad_fn._sequence_nr() for tensor in trunk if tensor.grad_fn is not None]
        found = [_marks_behind(output, marks, (), max(made, default=-1)) for output in outputs]
        if None not in found:
            return [keys for keys in found if keys is not None]
    inside = {node for tensor in trunk for node in nodes(tensor)}
    return [_marks_behind(output, marks, inside) or set() for output in outputs]


def _marks_behind(
    output: Tensor | None, marks: Mapping[Edge, T], inside: Container[Node], newest: int = -1
) -> set[T | Past] | None:
    """The keys of the marks behind `output`, and how it reads the nodes `inside`.

    None: it has a node as old as the `newest` of the trunk, or older, so these must be known.
    """
    found: set[T | Past] = set()
    pending: list[tuple[Node | None, int]] = []
    if output is not None and output.requires_grad:
        pending.append(edge_of(output))
    seen: set[Node] = set()
    while pending:
        node, number = pending.pop()
        if node is None:
            continue
        if (node, number) in marks:  # before `seen`: a node has several outputs, and not all are marks
            found.add(marks[node, number])
            continue
        if node in seen:
            continue
        seen.add(node)
        if node._sequence_nr() <= newest:
            return None
        if node not in inside or node.name() in _FORMS:
            pending += node.next_functions
        else:
            found.add(Past.PARAMETER if hasattr(node, "variable") else Past.INSIDE)
    return found

"""Walks through the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]  # a node, and the number of its input where a gradient arrives
T = TypeVar("T")


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


def depends_on(outputs: Iterable[Tensor | None], starts: Mapping[T, Iterable[Tensor]]) -> list[set[T]]:
    """For each output, the keys of the tensors in its graph. What lies behind such a tensor is not searched.

    Args:
        outputs: tensors with or without a graph; None has none.
        starts: the tensors that are looked for, by any key.
    """
    marks = {edge_of(t): key for key, tensors in starts.items() for t in tensors if t.requires_grad}
    return [_marks_behind(output, marks) for output in outputs]


def _marks_behind(output: Tensor | None, marks: Mapping[Edge, T]) -> set[T]:
    found: set[T] = set()
    pending: list[tuple[Node | None, int]] = []
    if output is not None and output.requires_grad:
        pending.append(edge_of(output))
    seen: set[Node] = set()
    while pending:
        node, number = pending.pop()
        if node is None or node in seen:
            continue
        if (node, number) in marks:
            found.add(marks[node, number])
        else:
            seen.add(node)
            pending.extend(node.next_functions)
    return found

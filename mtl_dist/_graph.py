"""Walking the autograd graph."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

Edge = tuple[Node, int]  # a node and which of its inputs a gradient arrives at
T = TypeVar("T")


def edge_of(tensor: Tensor) -> Edge:
    """Where the gradient of a tensor arrives."""
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def accumulators(output: Tensor) -> Iterator[Node]:
    """The nodes behind `output` that add into a leaf's gradient; the leaf is their `variable`."""
    return (node for node in nodes(output) if hasattr(node, "variable"))


def nodes(output: Tensor, ends: Iterable[Node] = ()) -> Iterator[Node]:
    """All nodes behind `output`, as far as `ends`."""
    pending: list[Node | None] = [output.grad_fn]
    seen = set(ends)
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        pending.extend(following for following, _ in node.next_functions)


def reached(output: Tensor, marks: Mapping[Edge, T]) -> set[T]:
    """The marks of the edges that `output` depends on. What lies behind a marked edge is not looked at."""
    found: set[T] = set()
    pending: list[tuple[Node | None, int]] = [edge_of(output)] if output.requires_grad else []
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

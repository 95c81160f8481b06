"""Walking the autograd graph."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.autograd.graph import Node


def accumulators(output: Tensor) -> Iterator[Node]:
    """The nodes behind `output` that add into a leaf's gradient; the leaf is their `variable`."""
    pending: list[Node | None] = [output.grad_fn]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node
        pending.extend(following for following, _ in node.next_functions)

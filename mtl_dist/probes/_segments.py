"""Cuts an autograd graph at its narrow places, so that the gradients of n losses go back through it in step.

n calls of `torch.autograd.grad` from the features to all shared parameters leave n gradients as large as the
model. Where all paths of the graph run through one place (between the layers of a chain, between residual
blocks), the graph can be cut: the n gradients at the cut are as large as activations, and one segment after
the other is traversed for all tasks, so that only the parameter gradients of one segment exist at a time.

Nothing is traversed twice, unless a piece between two cuts holds more parameters than asked for (a network
without narrow places, such as a U-Net): it is then traversed once for each group of its parameters.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

_LEAF = "torch::autograd::AccumulateGrad"
Edge = tuple[Node, int]  # a node and which of its inputs a gradient arrives at


@dataclass(frozen=True)
class Segment:
    """A part of the graph that is traversed at once.

    Attributes:
        entries: where gradients come in, from the features or from earlier segments.
        exits: where they leave for later segments.
        groups: the graph's ends at the parameters whose gradients are complete in this segment.
    """

    entries: tuple[Edge, ...]
    exits: tuple[Edge, ...]
    groups: tuple[tuple[Node, ...], ...]


@dataclass
class _Piece:
    """Nodes between two narrow places, and the leaves whose last use is there."""

    nodes: list[Node] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)

    def size(self) -> int:
        return sum(variable(leaf).numel() for leaf in self.leaves)


def variable(leaf: Node) -> Tensor:
    """The parameter at an end of the graph."""
    tensor: Tensor = leaf.variable  # type: ignore[attr-defined]  # only nodes that accumulate have it
    return tensor


def plan(features: Sequence[Tensor], wanted: Callable[[Tensor], bool], bucket: int) -> tuple[Segment, ...]:
    """The segments of the graph below `features` that leads to `wanted` leaves, in the order of a backward.

    A function of the graph's structure alone: ranks with the same graph have the same plan.

    Args:
        features: where gradients start.
        wanted: which leaf tensors are meant.
        bucket: elements of parameters that a group should hold at most; one parameter may be larger.

    Raises:
        ValueError: a part of the graph is hidden (reentrant activation checkpointing).
    """
    roots = [_edge(tensor) for tensor in features]
    heights = _heights([node for node, _ in roots], wanted)
    roots = [edge for edge in dict.fromkeys(roots) if edge[0] in heights]
    segments: list[Segment] = []
    pending = list(roots)
    for piece in _merged(_pieces(roots, heights), bucket):
        inside = {*piece.nodes, *piece.leaves}
        entries = [edge for edge in pending if edge[0] in inside]
        leaving = (edge for node in piece.nodes for edge in _children(node, heights))
        exits = list(dict.fromkeys(edge for edge in leaving if edge[0] not in inside))
        pending = list(dict.fromkeys([*(edge for edge in pending if edge[0] not in inside), *exits]))
        segments.append(Segment(tuple(entries), tuple(exits), tuple(_groups(piece.leaves, bucket))))
    return tuple(segments)


def stream(
    features: Sequence[Sequence[Tensor]],
    gradients: Sequence[Sequence[Tensor]],
    plans: Sequence[Sequence[Segment]],
) -> Iterator[Iterator[Sequence[Tensor | None]]]:
    """For each group of each segment, the n tasks' gradients of its parameters, one task after the other.

    Every iterator must be used up before the next one is asked for. The graphs are kept.

    Args:
        features: for each task, the tensors that `plan` was given.
        gradients: for each task, the gradients there.
        plans: for each task, the plan of its graph; tasks may share one graph.
    """
    carried = [
        _added({}, ((_edge(tensor), gradient) for tensor, gradient in zip(*pair, strict=True)))
        for pair in zip(features, gradients, strict=True)
    ]
    for segments in zip(*plans, strict=True):
        for number in range(len(segments[0].groups)):
            yield (_of_group(held, segment, number) for held, segment in zip(carried, segments, strict=True))


def _of_group(carried: dict[Edge, Tensor], segment: Segment, number: int) -> Sequence[Tensor | None]:
    """Gradients of one group of leaves; takes the carried gradients on with the last group of a segment."""
    last = number == len(segment.groups) - 1
    exits, leaves = segment.exits if last else (), segment.groups[number]
    entries = [edge for edge in segment.entries if edge in carried]
    inputs = [*exits, *((leaf, 0) for leaf in leaves)]
    if not entries or not inputs:
        return [None] * len(leaves)
    found = torch.autograd.grad(
        [GradientEdge(*edge) for edge in entries],
        [GradientEdge(*edge) for edge in inputs],
        [carried[edge] for edge in entries],
        retain_graph=True,
        allow_unused=True,
    )
    if last:
        for edge in entries:
            del carried[edge]
        _added(carried, zip(exits, found, strict=False))
    return found[len(exits) :]


def _added(held: dict[Edge, Tensor], new: Iterable[tuple[Edge, Tensor | None]]) -> dict[Edge, Tensor]:
    for edge, gradient in new:
        if gradient is not None:
            held[edge] = held[edge] + gradient if edge in held else gradient
    return held


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _children(node: Node, kept: dict[Node, int]) -> list[Edge]:
    return [(child, number) for child, number in node.next_functions if child is not None and child in kept]


def _heights(roots: Iterable[Node], wanted: Callable[[Tensor], bool]) -> dict[Node, int]:
    """Of every node that leads to a wanted leaf: the length of its longest path to one."""
    heights: dict[Node, int | None] = {}
    pending = list(roots)
    while pending:
        node = pending[-1]
        children = [child for child, _ in node.next_functions if child is not None]
        unknown = [child for child in children if child not in heights]
        if node not in heights and unknown:
            pending.extend(unknown)
            continue
        pending.pop()
        if node not in heights:
            _check_open(node)
            below = [height for child in children if (height := heights[child]) is not None]
            is_wanted = node.name() == _LEAF and wanted(variable(node))
            heights[node] = 0 if is_wanted else 1 + max(below) if below else None
    return {node: height for node, height in heights.items() if height is not None}


def _check_open(node: Node) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            "the parameters in torch.utils.checkpoint(..., use_reentrant=True) cannot be seen in the graph "
            "of the features: give use_reentrant=False, or use FeatureProbe()"
        )


def _pieces(roots: Sequence[Edge], heights: dict[Node, int]) -> Iterator[_Piece]:
    """The graph in topological order, cut wherever at most one node waits for gradients from above.

    With two such nodes, one may lie behind the other, and autograd, asked for the gradients at both, would
    count a path twice. Side branches come first (lowest height): they end, and the main path stays.
    """
    waits = Counter(child for node in heights for child, _ in _children(node, heights))
    starts = [node for node in dict.fromkeys(node for node, _ in roots) if not waits[node]]
    ready = [(heights[node], number, node) for number, node in enumerate(starts)]
    heapq.heapify(ready)
    number = len(ready)
    reached: set[Node] = set()
    piece = _Piece()
    while ready:
        _, _, node = heapq.heappop(ready)
        reached.discard(node)
        (piece.nodes if heights[node] else piece.leaves).append(node)
        for child, _ in _children(node, heights):
            reached.add(child)
            waits[child] -= 1
            if not waits[child] and heights[child]:
                number += 1
                heapq.heappush(ready, (heights[child], number, child))
            elif not waits[child]:
                reached.discard(child)
                piece.leaves.append(child)
        if len(reached) <= 1:
            yield piece
            piece = _Piece()


def _merged(pieces: Iterable[_Piece], bucket: int) -> Iterator[_Piece]:
    """Neighbours together, as long as their parameters fit into one bucket."""
    whole = _Piece()
    for piece in pieces:
        if whole.leaves and piece.leaves and whole.size() + piece.size() > bucket:
            yield whole
            whole = _Piece()
        whole.nodes += piece.nodes
        whole.leaves += piece.leaves
    if whole.leaves:
        yield whole


def _groups(leaves: Sequence[Node], bucket: int) -> Iterator[tuple[Node, ...]]:
    group: list[Node] = []
    size = 0
    for leaf in leaves:
        length = variable(leaf).numel()
        if group and size + length > bucket:
            yield tuple(group)
            group, size = [], 0
        group.append(leaf)
        size += length
    if group:
        yield tuple(group)

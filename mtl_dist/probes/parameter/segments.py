"""Cuts an autograd graph at its narrow places, so that n gradients can go back through it side by side.

n calls of `torch.autograd.grad` from the features to all shared parameters leave n gradients as large as the
model. Where all paths of the graph run through one place (between the layers of a chain, between residual
blocks), the graph can be cut. The n gradients at the cut are only as large as activations. One segment after
the other is traversed for all tasks, so only the parameter gradients of one segment exist at a time.

Nothing is traversed twice, with one exception: a piece between two cuts that holds more parameters than asked
for (a network without narrow places, such as a U-Net) is traversed once for each group of its parameters.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from mtl_dist.engines import UNIT_NODE, Edge, edge_of, is_there, whole_shape

_LEAF = "torch::autograd::AccumulateGrad"
_SMALLEST, _PART = 1 << 22, 8  # of a bucket: elements, and part of all parameters


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


@dataclass(frozen=True)
class Plan:
    """How a graph is traversed.

    Attributes:
        segments: in the order of a backward.
        units: whether FSDP2 shards parts of the graph as units.
        parameters: all parameters in the graph, wanted or not.
    """

    segments: tuple[Segment, ...]
    units: bool
    parameters: tuple[Tensor, ...]

    @property
    def groups(self) -> list[tuple[Node, ...]]:
        """The ends of the graph, in the order of their gradients."""
        return [group for segment in self.segments for group in segment.groups]


@dataclass
class _Piece:
    """Nodes between two narrow places, and the leaves whose last use is there."""

    nodes: list[Node] = field(default_factory=list)
    leaves: list[Node] = field(default_factory=list)

    def size(self) -> int:
        return sum(math.prod(shape_of(leaf)) for leaf in self.leaves)


def variable(leaf: Node) -> Tensor:
    """The parameter at an end of the graph."""
    tensor: Tensor = leaf.variable  # type: ignore[attr-defined]  # only nodes that accumulate have it
    return tensor


def shape_of(leaf: Node) -> tuple[int, ...]:
    """The shape of the parameter at an end of the graph, also where this rank holds only a part of it."""
    return whole_shape(variable(leaf))


def bucket_size(sizes: Sequence[int]) -> int:
    """Elements of parameters that a group should hold at most, where nothing else was asked for.

    As many as the largest piece of the graph has, so that no piece is traversed twice; an eighth of all for
    networks with a larger piece.

    Args:
        sizes: elements of the parameters of each piece.
    """
    return max(_SMALLEST, min(max(sizes, default=0), -(-sum(sizes) // _PART)))


def plan(
    features: Sequence[Tensor], wanted: Callable[[Tensor], bool], bucket: int | None, *, once: bool = False
) -> Plan:
    """Segments of the graph below `features` that leads to `wanted` leaves, in the order of a backward.

    A function of the graph's structure alone: ranks with the same graph have the same plan.

    Args:
        features: where gradients start.
        wanted: which leaf tensors are meant.
        bucket: elements of parameters that a group should hold at most; one parameter may be larger. None:
            see `bucket_size`.
        once: never traverse a node twice, and rather have larger groups.

    Raises:
        ValueError: a part of the graph is hidden (reentrant activation checkpointing).
    """
    roots = [edge_of(tensor) for tensor in features]
    leaves: list[Node] = []
    heights = _heights([node for node, _ in roots], wanted, leaves)
    parameters = tuple(variable(leaf) for leaf in leaves)
    units = any(node.name() == UNIT_NODE for node in heights) or not all(map(is_there, parameters))
    roots = [edge for edge in dict.fromkeys(roots) if edge[0] in heights]
    segments: list[Segment] = []
    pending = list(roots)
    pieces = list(_pieces(roots, heights, units=units))
    size = bucket_size([piece.size() for piece in pieces]) if bucket is None else bucket
    for piece in _merged(pieces, size):
        inside = {*piece.nodes, *piece.leaves}
        entries = [edge for edge in pending if edge[0] in inside]
        leaving = (edge for node in piece.nodes for edge in _children(node, heights))
        exits = list(dict.fromkeys(edge for edge in leaving if edge[0] not in inside))
        pending = list(dict.fromkeys([*(edge for edge in pending if edge[0] not in inside), *exits]))
        groups = [tuple(piece.leaves)] if once else grouped(piece.leaves, size)
        segments.append(Segment(tuple(entries), tuple(exits), tuple(groups)))
    return Plan(tuple(segments), units, parameters)


def _children(node: Node, kept: dict[Node, int]) -> list[Edge]:
    return [(child, number) for child, number in node.next_functions if child is not None and child in kept]


def _heights(roots: Iterable[Node], wanted: Callable[[Tensor], bool], leaves: list[Node]) -> dict[Node, int]:
    """Of every node that leads to a wanted leaf: its longest path to one. Appends all leaves to `leaves`."""
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
            is_leaf = node.name() == _LEAF
            is_wanted = is_leaf and wanted(variable(node))
            if is_leaf:
                leaves.append(node)
            heights[node] = 0 if is_wanted else 1 + max(below) if below else None
    return {node: height for node, height in heights.items() if height is not None}


def _check_open(node: Node) -> None:
    if node.name() == "CheckpointFunctionBackward":
        raise ValueError(
            "the parameters in torch.utils.checkpoint(..., use_reentrant=True) cannot be seen in the graph "
            "of the features: give use_reentrant=False, or use FeatureProbe()"
        )


def _pieces(roots: Sequence[Edge], heights: dict[Node, int], *, units: bool) -> Iterator[_Piece]:
    """The graph in topological order, cut wherever at most one node waits for gradients from above.

    With two such nodes, one may lie behind the other, and autograd, asked for the gradients at both, would
    count a path twice. Side branches come first (lowest height): they end, and the main path stays.
    Under FSDP2 the cuts lie between its units, because it frees a unit's parameters after each traversal,
    and gathers them again where the next one enters the unit.
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
        if not reached or (len(reached) == 1 and (not units or node.name() == UNIT_NODE)):
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


def grouped(leaves: Sequence[Node], bucket: int) -> Iterator[tuple[Node, ...]]:
    """Ends of a graph in groups of about `bucket` elements of parameters."""
    group: list[Node] = []
    size = 0
    for leaf in leaves:
        length = math.prod(shape_of(leaf))
        if group and size + length > bucket:
            yield tuple(group)
            group, size = [], 0
        group.append(leaf)
        size += length
    if group:
        yield tuple(group)

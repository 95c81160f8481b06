"""n tasks' gradients through the segments of their graph, one segment after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mtl_dist.engines import Edge, edge_of, is_partitioned, is_there, kept
from mtl_dist.probes.parameter.segments import Plan, Segment, variable


def stream(
    features: Sequence[Sequence[Tensor]],
    gradients: Sequence[Sequence[Tensor]],
    plans: Sequence[Plan],
) -> Iterator[Iterator[Sequence[Tensor | None]]]:
    """For each group of each segment, the n tasks' gradients of its parameters, one task after the other.

    Each iterator must be used up before the next one is asked for. The graphs are kept.

    Args:
        features: for each task, the tensors that `plan` was given.
        gradients: for each task, the gradients there.
        plans: for each task, the plan of its graph; tasks may share one graph.

    Raises:
        RuntimeError: FSDP2 freed the parameters of a single unit that left no trace in the graph.
    """
    carried = [
        _added({}, ((edge_of(tensor), gradient) for tensor, gradient in zip(*pair, strict=True)))
        for pair in zip(features, gradients, strict=True)
    ]
    with kept(plans[0].parameters if plans[0].units else ()) as restore:
        for segments in zip(*(plan.segments for plan in plans), strict=True):
            for number in range(len(segments[0].groups)):
                _check_there(plans[0])
                yield (
                    _of_group(held, segment, number, restore)
                    for held, segment in zip(carried, segments, strict=True)
                )


def direct(
    losses: Sequence[Tensor | None], scale: Tensor | None, plan: Plan
) -> Iterator[Iterator[Sequence[Tensor | None]]]:
    """As `stream`, of losses that reach the parameters on other ways too.

    Each goes back through its whole graph. It takes one pass for each task and each group of parameters.

    Args:
        losses: of the tasks; None where there is none.
        scale: scalar to differentiate the losses with; None: 1.
        plan: of the graph behind the features, which names the parameters.
    """
    for group in plan.groups:
        parameters = [variable(leaf) for leaf in group]
        yield (_of_loss(loss, scale, parameters) for loss in losses)


def _of_loss(
    loss: Tensor | None, scale: Tensor | None, parameters: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    if loss is None or not loss.requires_grad:
        return [None] * len(parameters)
    if scale is not None:
        loss = scale.to(torch.float32) * loss.to(torch.float32)
    return torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)


def _check_there(plan: Plan) -> None:
    if plan.units:  # `kept` restores them
        return
    # ZeRO-3 gathers its own parameters itself
    if any(not is_there(p) and not is_partitioned(p) for p in plan.parameters):
        raise RuntimeError(
            "ParameterProbe: FSDP2 freed the trunk's parameters after the first of several buckets, and "
            "gathers them again at the trunk's output only. Shard the trunk's blocks as units of their own, "
            "or take a bucket as large as the trunk, or leave reshard_after_forward=True"
        )


def _of_group(
    carried: dict[Edge, Tensor], segment: Segment, number: int, restore: Callable[[], None]
) -> Sequence[Tensor | None]:
    """Gradients of one group of leaves; takes the carried gradients on with the last group of a segment."""
    last = number == len(segment.groups) - 1
    exits, leaves = segment.exits if last else (), segment.groups[number]
    entries = [edge for edge in segment.entries if edge in carried]
    inputs = [*exits, *((leaf, 0) for leaf in leaves)]
    if not entries or not inputs:
        return [None] * len(leaves)
    restore()
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

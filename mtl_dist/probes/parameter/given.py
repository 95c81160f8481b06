"""Parameters that the user names, where losses are given without features."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mtl_dist.engines import edge_of, is_partitioned, is_sharded, nodes
from mtl_dist.losses import LocalLosses, TaskLosses
from mtl_dist.probes.base import StepContext
from mtl_dist.probes.parameter.rows import Trunk
from mtl_dist.probes.parameter.segments import Plan, Segment, bucket_size, grouped

_LOGGER = logging.getLogger("mtl_dist")

ELSEWHERE = (
    "parameters= holds parameters that {engine} shards, whose gradients are not known before the backward: "
    "use plain torch, DDP or ZeRO 0-2, or balancer(features, heads) with FeatureProbe()"
)


def named(parameters: Any, bucket: int | None) -> Trunk:
    """The parameters as the ends of a graph that is not walked.

    Args:
        parameters: a module, a tensor, or tensors.
        bucket: elements of parameters that a group should hold at most; None: see `bucket_size`.

    Raises:
        TypeError: something else.
        ValueError: none of them is trained, one is no leaf of the graph, or an engine shards them.
    """
    if isinstance(parameters, nn.Module):
        parameters = parameters.parameters()
    given = [parameters] if isinstance(parameters, Tensor) else parameters
    given = list(given) if isinstance(given, Iterable) else [given]
    if not all(isinstance(one, Tensor) for one in given):
        kinds = sorted({type(one).__name__ for one in given})
        raise TypeError(f"parameters= is a module or tensors, such as net.parameters(); got {kinds}")
    for engine, is_one in (("FSDP2 (or tensor parallelism)", is_sharded), ("ZeRO-3", is_partitioned)):
        if any(map(is_one, given)):
            raise ValueError(ELSEWHERE.format(engine=engine))
    trained = [one for one in dict.fromkeys(given) if one.requires_grad]
    if not trained:
        raise ValueError(
            f"parameters= holds {len(given)} tensors, and none requires a gradient: give those that are "
            "trained"
        )
    if not all(one.is_leaf for one in trained):
        raise ValueError(
            "parameters= holds a tensor that the graph computed: give parameters, or measure at features "
            "with balancer(features, heads)"
        )
    leaves = [edge_of(one)[0] for one in trained]
    size = bucket_size([sum(one.numel() for one in trained)]) if bucket is None else bucket
    segment = Segment((), (), tuple(grouped(leaves, size)))
    return Trunk((), Plan((segment,), units=False, parameters=tuple(trained)))


def check_reached(losses: LocalLosses, trunk: Trunk, step: StepContext) -> None:
    """Looks once whether the losses depend on the parameters. Rank 0 says which does not.

    Raises:
        ValueError: none of them does.
    """
    if "reached" in step.engine.told or not losses.outputs:
        return
    step.engine.told.add("reached")
    ends = {leaf for group in trunk.plan.groups for leaf in group}
    values = losses.values if isinstance(losses, TaskLosses) else losses.outputs
    found = [None if one is None or not one.requires_grad else _reaches(one, ends) for one in values]
    if not any(found):
        raise ValueError(
            "no loss depends on any of the parameters=: give the parameters of the model that made the "
            "losses, such as those of its last shared layer. (A checkpoint with use_reentrant=True hides "
            "them.)"
        )
    for task, reached in zip(step.tasks, found, strict=False):
        if reached is False and step.rank == 0:
            _LOGGER.warning(
                "mtl_dist: the loss of task %r does not depend on the parameters=. Rules that read gradients "
                "see 0 there: give parameters that all tasks share, or take this loss out of the tasks and "
                "add it to the result",
                task,
            )


def _reaches(loss: Tensor, ends: set[Any]) -> bool:
    return any(node in ends for node in nodes(loss))

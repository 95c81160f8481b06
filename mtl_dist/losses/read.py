"""From the arguments of a balancer's call to the one contract that everything behind it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtl_dist.losses.base import Counts, Heads, Refuse
from mtl_dist.losses.samples import GivenSampleLosses, SampleHeads
from mtl_dist.losses.tasks import GivenLosses, HeadMapping, JointHeads


def read_heads(
    heads: Any, counts: Counts | None, task_ids: Any, mask: Any, tasks: Sequence[str], refuse: Refuse
) -> Heads:
    """The heads of one call, in whatever form they were given.

    Args:
        heads: a mapping of functions, one function, or None where losses are given in the features' place.
        counts: samples behind each mean, by task.
        task_ids: the task of every sample, for batches in which every sample has one task.
        mask: with `task_ids`, which losses count.
        tasks: the n task names.
        refuse: raises an error on this rank, and tells the other ranks.

    Raises:
        ValueError: arguments that do not go together.
        TypeError: heads that are neither a mapping nor a function.
    """
    if task_ids is not None:
        if counts is not None:
            raise ValueError("with task_ids=, counts follow from them: leave counts= out, and give mask=")
        if heads is not None and (isinstance(heads, Mapping) or not callable(heads)):
            raise TypeError(
                "with task_ids=, heads is one function from the features to the loss of every sample; got "
                f"{type(heads).__name__}"
            )
        given = GivenSampleLosses(task_ids, mask, tasks, refuse)
        return given if heads is None else SampleHeads(heads, given)
    if mask is not None:
        raise ValueError("mask= goes with task_ids=; losses by task take their number in counts=")
    if heads is None:
        return GivenLosses(counts, tasks, refuse)
    if isinstance(heads, Mapping):
        return HeadMapping(heads, counts, tasks, refuse)
    if not callable(heads):
        raise TypeError(f"heads must be a mapping of functions or a function, got {type(heads).__name__}")
    return JointHeads(heads, counts, tasks, refuse)

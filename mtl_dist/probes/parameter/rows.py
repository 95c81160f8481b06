"""From the gradients of the tasks at the features to those of all shared parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.probes.base import StepContext
from mtl_dist.probes.parameter.passes import stream
from mtl_dist.probes.parameter.segments import Plan, plan, shape_of, variable


@dataclass(frozen=True)
class Trunk:
    """The graph from the features down to the shared parameters, ready to be traversed.

    Attributes:
        leaves: the features.
        plan: of the traversal.
    """

    leaves: tuple[Tensor, ...]
    plan: Plan

    @classmethod
    def below(
        cls, leaves: tuple[Tensor, ...], wanted: Callable[[Tensor], bool], bucket: int, *, once: bool = False
    ) -> Trunk:
        """The trunk that made `leaves`, with a `plan` of these arguments.

        Raises:
            ValueError: no wanted parameter is there, or a part of the graph is hidden.
        """
        trunk = cls(leaves, plan(leaves, wanted, bucket, once=once))
        if not trunk.plan.segments:
            raise ValueError(
                "ParameterProbe: no shared parameter is behind the features. Give it features that a "
                "trainable trunk made in this forward (not detached), and under FSDP2 leave `parameters` None"
            )
        return trunk

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Of the parameters, group by group."""
        return [[shape_of(leaf) for leaf in group] for group in self.plan.groups]


def check_same_parameters(trunk: Trunk, step: StepContext, device: torch.device) -> None:
    """Compares number and shapes of the shared parameters over ranks; two small collectives, the host waits.

    Raises:
        ValueError: they differ; on every rank.
    """
    digest = zlib.crc32(repr(trunk.shapes).encode())
    number = sum(len(group) for group in trunk.plan.groups)
    mine = torch.tensor([[number, digest]], device=device)
    everyone = step.gather_rows(mine)
    if bool((everyone != mine).any()):
        numbers = everyone[:, 0].tolist()
        raise ValueError(
            f"ParameterProbe: the features' graphs hold {numbers} shared parameters on ranks 0, 1, ..., and "
            "these must be the same on all. A trunk whose layers depend on the data needs FeatureProbe()"
        )


def parameter_rows(
    trunks: Sequence[Trunk], gradients: Sequence[Sequence[Tensor]], counts: Tensor
) -> Iterator[Tensor]:
    """`[n, D]` rows `c_i ∂l_i/∂θ` of one group of parameters after the other.

    Args:
        trunks: for each task; tasks may share one.
        gradients: `∂l_i/∂z` for each task, one tensor a leaf of the features.
        counts: `[n]`, `c_i`.
    """
    passes = stream([t.leaves for t in trunks], gradients, [t.plan for t in trunks])
    for group, tasks in zip(trunks[0].plan.groups, passes, strict=True):
        lengths = [math.prod(shape_of(leaf)) for leaf in group]
        double = any(variable(leaf).dtype == torch.float64 for leaf in group)
        rows = torch.zeros(
            len(trunks), sum(lengths), dtype=torch.float64 if double else torch.float32, device=counts.device
        )
        for row, count, found in zip(rows, counts, tasks, strict=True):
            for part, gradient in zip(row.split(lengths), found, strict=True):
                if gradient is not None:
                    part.copy_(gradient.flatten())
            row.mul_(count)
        yield rows

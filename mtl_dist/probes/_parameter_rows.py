"""From the tasks' gradients at the features to the Gram of their gradients of all shared parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.probes._base import Exchange
from mtl_dist.probes._features import gradient_gram
from mtl_dist.probes._passes import stream
from mtl_dist.probes._segments import Plan, plan, shape_of, variable
from mtl_dist.probes._sketch import CountSketch
from mtl_dist.stats import stats_dtype


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


def check_same_parameters(trunk: Trunk, exchange: Exchange, device: torch.device) -> None:
    """Compares number and shapes of the shared parameters over ranks; two small collectives, the host waits.

    Raises:
        ValueError: they differ; on every rank.
    """
    digest = zlib.crc32(repr(trunk.shapes).encode())
    number = sum(len(group) for group in trunk.plan.groups)
    mine = torch.tensor([[number, digest]], device=device)
    everyone = exchange.gather_rows(mine)
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


def reduced_gram(
    blocks: Iterator[Tensor],
    exchange: Exchange,
    num_tasks: int,
    device: torch.device,
    sketch: CountSketch | None,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the Gram of rows summed over ranks, and which tasks are not finite here.

    Exactly, one reduce-scatter a block; or of a sketch, one for all.

    Returns:
        `[n, n]`, and `[n]` bool.
    """
    gram = torch.zeros(num_tasks, num_tasks, dtype=stats_dtype(device), device=device)
    faulty = torch.zeros(num_tasks, dtype=torch.bool, device=device)
    total = None if sketch is None else sketch.zeros(num_tasks, device)
    offset = 0
    for rows in blocks:
        faulty |= ~rows.abs().amax(1).isfinite()
        if sketch is None or total is None:
            gram += _gram_of_piece(rows, exchange)
        else:
            sketch.add_(total, rows, offset)
            offset += rows.shape[1]
    if sketch is not None and total is not None:
        gram += _gram_of_piece(sketch.fold(total), exchange)
    return gram, faulty


def _gram_of_piece(rows: Tensor, exchange: Exchange) -> Tensor:
    """The gradients are averaged first, then multiplied: a Gram of averages is no average of Grams."""
    return gradient_gram([[row] for row in exchange.scatter_sum(rows)], rows.device)

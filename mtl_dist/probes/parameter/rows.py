"""From the gradients of the tasks at the features to those of all shared parameters."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from mtl_dist.losses import LocalLosses, real
from mtl_dist.probes.base import StepContext
from mtl_dist.probes.parameter.passes import direct, stream
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
        cls,
        leaves: tuple[Tensor, ...],
        wanted: Callable[[Tensor], bool],
        bucket: int | None,
        *,
        once: bool = False,
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


class Weighing(NamedTuple):
    """What makes `c_i g_i` of `g_i`, in two factors.

    The first one stands before the passes through the trunk: where ranks share sequences, a pass brings
    gradients of losses of other ranks, with the counts of those. The second one is the same on every rank.

    Attributes:
        shares: `[n]`, `W c_i / C_i`, 1 where all ranks have the same counts.
        rest: `[n]`, `C_i / W`.
    """

    shares: Tensor
    rest: Tensor

    @classmethod
    def of(cls, counts: Tensor, total: Tensor, world_size: int) -> Weighing:
        """From the counts of this rank and of all."""
        shares = world_size * counts / total.clamp(min=torch.finfo(total.dtype).tiny)
        return cls(shares, total / world_size)


def check_same_parameters(trunk: Trunk, step: StepContext, device: torch.device, world_size: int) -> None:
    """Compares number and shapes of the shared parameters over ranks; two small collectives, the host waits.

    One process has nothing to compare, and its host does not wait.

    Raises:
        ValueError: they differ; on every rank.
    """
    if world_size == 1:
        return
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
    trunks: Sequence[Trunk], gradients: Sequence[Sequence[Tensor]], weighing: Weighing
) -> Iterator[Tensor]:
    """`[n, D]` rows of one group of parameters after the other, which sum over ranks to `C_i ∂L_i/∂θ`.

    Args:
        trunks: for each task; tasks may share one.
        gradients: `∂l_i/∂z` for each task, one tensor per leaf of the features.
        weighing: of the tasks.
    """
    weighed = [
        [_weighed(g, share) for g in row] for row, share in zip(gradients, weighing.shares, strict=True)
    ]
    passes = stream([t.leaves for t in trunks], weighed, [t.plan for t in trunks])
    return _rows(trunks[0].plan, passes, weighing.rest)


def rows_of_losses(
    trunk: Trunk, losses: LocalLosses, scale: Tensor | None, weighing: Weighing
) -> Iterator[Tensor]:
    """The same rows, from gradients of the losses themselves: for losses that reach θ past the features too.

    Args:
        trunk: of all tasks.
        losses: of this rank, with their graphs.
        scale: scalar to differentiate the losses with; None: 1.
        weighing: of the tasks.
    """
    return _rows(trunk.plan, direct(losses.weighed(weighing.shares), scale, trunk.plan), weighing.rest)


def _rows(
    plan: Plan, passes: Iterator[Iterator[Sequence[Tensor | None]]], factors: Tensor
) -> Iterator[Tensor]:
    for group, tasks in zip(plan.groups, passes, strict=True):
        lengths = [_real_length(leaf) for leaf in group]
        double = any(variable(leaf).dtype in (torch.float64, torch.complex128) for leaf in group)
        dtype = torch.float64 if double else torch.float32
        rows = torch.empty(len(factors), sum(lengths), dtype=dtype, device=factors.device)
        for row, factor, found in zip(rows, factors, tasks, strict=True):
            for part, gradient in zip(row.split(lengths), found, strict=True):
                _fill(part, gradient, factor)
        yield rows


def _fill(part: Tensor, gradient: Tensor | None, factor: Tensor) -> None:
    """Writes `factor * gradient`; None is zero."""
    if gradient is None:
        part.zero_()
        return
    own = _real(gradient)
    if own.dtype == part.dtype and own.device == part.device:
        torch.mul(own, factor, out=part)  # in one pass
    else:
        part.copy_(own).mul_(factor)


def _weighed(gradient: Tensor, share: Tensor) -> Tensor:
    share = share.to(gradient.device)  # of the features, which may be on several
    precise = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    # the mean over no sample may be NaN
    return (share * precise).masked_fill_(share == 0, 0).to(gradient.dtype)


def _real_length(leaf: Node) -> int:
    """Number of real coordinates of a parameter."""
    return math.prod(shape_of(leaf)) * (2 if variable(leaf).is_complex() else 1)


def _real(gradient: Tensor) -> Tensor:
    """A gradient as real numbers, flat. Embeddings may give it sparse."""
    if gradient.layout != torch.strided:
        gradient = gradient.to_dense()
    return real(gradient).flatten()

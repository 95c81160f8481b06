"""Label statistics of all ranks: one comparison of what the tasks are, then the two sums of `_base`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mtl_dist.sync import all_reduce_sum, collective_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mtl_dist.priors._base import LabelStatistics

S = TypeVar("S", bound="LabelStatistics")


def synchronize(statistics: Mapping[str, S], group: ProcessGroup | None = None) -> dict[str, S]:
    """Statistics of the labels of all ranks, by task; a collective, to be called on every rank.

    Three all-reduces, whose sizes depend on the tasks alone: a comparison of the tasks, all sums, all squares
    about the global means.

    Args:
        statistics: of this rank, by task name; any of them may have seen no labels.
        group: the data-parallel ranks; None for all.

    Raises:
        ValueError: on every rank, where ranks have different tasks or define different losses.
    """
    device = collective_device(group)
    _check_agreement({task: repr(one) for task, one in statistics.items()}, device, group)
    local = [one._to(device) for one in statistics.values()]
    # T = Σ_r T_r
    packed = all_reduce_sum(torch.cat([one._sums for one in local]), group)
    sums = torch.split(packed, [len(one._sums) for one in local])
    # S = Σ_r (S_r + n_r ‖T_r / n_r - T / n‖²)
    about = torch.stack([one.squares_about(total) for one, total in zip(local, sums, strict=True)])
    squares = all_reduce_sum(about, group)
    return {
        task: one.holding(total.cpu(), square.cpu())
        for task, one, total, square in zip(statistics, local, sums, squares, strict=True)
    }


def _check_agreement(losses: dict[str, str], device: torch.device, group: ProcessGroup | None) -> None:
    """Compares a digest of the tasks in a buffer of fixed size, because unequal buffers would hang."""
    digest = _digest(losses).to(device)
    world, total, squares = all_reduce_sum(
        torch.stack([torch.ones_like(digest), digest, digest.square()]), group
    )
    # W Σ_r b_r² = (Σ_r b_r)² only where all b_r are equal; exact, because bytes are small integers
    if not torch.equal(world * squares, total.square()):
        raise ValueError(
            f"ranks have different tasks or losses; give every rank the same, here they are {losses}"
        )


def _digest(losses: dict[str, str]) -> Tensor:
    """`[16]`, bytes that differ where the tasks or their losses do."""
    return torch.tensor(list(hashlib.sha256(repr(losses).encode()).digest()[:16]), dtype=torch.float64)

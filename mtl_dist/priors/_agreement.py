"""Checks that all ranks have the same tasks and losses, before any statistics are summed."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mtl_dist.sync import all_reduce_sum

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def check_agreement(losses: dict[str, str], device: torch.device, group: ProcessGroup | None) -> None:
    """Compares a digest of the tasks. The buffer has a fixed size: buffers of unequal size would hang.

    Args:
        losses: task -> description of its loss, on this rank.
        device: device of the collective.
        group: the data-parallel ranks; None for all.

    Raises:
        ValueError: on every rank, if ranks have different tasks or losses.
    """
    digest = _digest(losses).to(device)
    world, total, squares = all_reduce_sum(
        torch.stack([torch.ones_like(digest), digest, digest.square()]), group
    )
    # W Σ_r b_r² = (Σ_r b_r)² only if all b_r are equal; exact, because bytes are small integers
    if not torch.equal(world * squares, total.square()):
        raise ValueError(
            f"ranks have different tasks or losses; give every rank the same. This rank has {losses}"
        )


def _digest(losses: dict[str, str]) -> Tensor:
    """`[16]` bytes, which differ if the tasks or their losses differ."""
    return torch.tensor(list(hashlib.sha256(repr(losses).encode()).digest()[:16]), dtype=torch.float64)

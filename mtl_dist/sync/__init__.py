"""Meetings of the ranks: one all-reduce per step. The only room that names a collective."""

from __future__ import annotations

from mtl_dist.sync.agreement import Identity
from mtl_dist.sync.collectives import (
    Collectives,
    all_reduce_sum,
    collective_device,
    is_distributed,
    virtual_rank,
)
from mtl_dist.sync.layout import Call, Kind, Layout
from mtl_dist.sync.notice import Notice
from mtl_dist.sync.summed import Bad, Faults, HostCopy, Summed
from mtl_dist.sync.synchronizer import Synchronizer
from mtl_dist.sync.timing import Stopwatch

__all__ = [
    "Bad",
    "Call",
    "Collectives",
    "Faults",
    "HostCopy",
    "Identity",
    "Kind",
    "Layout",
    "Notice",
    "Stopwatch",
    "Summed",
    "Synchronizer",
    "all_reduce_sum",
    "collective_device",
    "is_distributed",
    "virtual_rank",
]

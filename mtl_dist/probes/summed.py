"""The Gram of gradients that share their coordinates over ranks: they are summed first, then multiplied."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtl_dist.losses import gradient_gram
from mtl_dist.probes.base import StepContext
from mtl_dist.probes.sketch import CountSketch
from mtl_dist.stats import stats_dtype


def summed_gram(
    blocks: Iterator[Tensor],
    step: StepContext,
    num_tasks: int,
    device: torch.device,
    sketch: CountSketch | None,
) -> tuple[Tensor, Tensor]:
    """This rank's part of the Gram of rows summed over ranks, and which tasks are not finite on this rank.

    The exact form takes one reduce-scatter per block, the sketch one for all blocks.

    Args:
        blocks: `[n, D_b]`, columns of the n rows, the same shapes on every rank.
        step: this step, after its first reduction.
        num_tasks: n.
        device: where the result is wanted.
        sketch: replaces the rows by short random projections; None: exact.

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
            gram += _gram_of_piece(rows, step)
        else:
            sketch.add_(total, rows, offset)
            offset += rows.shape[1]
    if sketch is not None and total is not None:
        gram += _gram_of_piece(sketch.fold(total), step)
    return gram, faulty


def _gram_of_piece(rows: Tensor, step: StepContext) -> Tensor:
    return gradient_gram([[row] for row in step.scatter_sum(rows)], rows.device)

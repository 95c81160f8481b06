"""The sample-kernel form of inner products of a layer's gradients, for fewer rows than inputs of the layer.

    ⟨A_i, A_j⟩ = Σ_{s,t} (x_s · x_t) (g_i,s · g_j,t)

over the rows s, t of all ranks. The rows are gathered, then each rank does a part of the work.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mtl_dist.losses import gradient_gram
from mtl_dist.probes.base import StepContext
from mtl_dist.probes.shared_layer.products import BLOCK, Products
from mtl_dist.stats import stats_dtype

_STEPS = 4  # of the triangle: 5/8 of the products of the whole square, in matrices that are still large


def kernel_gram(products: Products, step: StepContext, world_size: int) -> Tensor:
    """`[n, n]`, this rank's part of the Gram of `products`, which have one group."""
    inputs, gradients, tasks = _of_all_ranks(products, step, world_size)
    with torch.autocast(inputs.device.type, enabled=False):
        if tasks is not None:
            own = slice(step.rank, None, world_size)
            return _of_pairs(inputs, gradients[0], tasks, products.num_tasks, own)
        n = products.num_tasks
        gram = torch.zeros(n, n, dtype=stats_dtype(inputs.device), device=inputs.device)
        for block in _blocks(inputs, gradients[..., step.rank :: world_size]):
            gram += gradient_gram([[row] for row in block], inputs.device)
        return gram


def _of_all_ranks(
    products: Products, step: StepContext, world_size: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`[R, d_in]`, `[q, R, d_out]` and `[R]` (tasks, where q is 1), packed into one collective."""
    inputs, gradients, tasks = products.inputs[:, 0], products.gradients[:, :, 0], products.tasks
    if world_size == 1:
        return inputs, gradients, tasks
    ids = inputs.new_zeros(len(inputs)) if tasks is None else tasks.to(inputs.dtype)  # exact below 2^24
    everyone = step.gather_rows(torch.cat([inputs, *gradients, ids[:, None]], dim=1))
    depth, width = inputs.shape[-1], gradients.shape[-1]
    gathered = everyone[:, depth:-1].reshape(len(everyone), len(gradients), width)
    tasks = None if tasks is None else everyone[:, -1].long()
    return everyone[:, :depth], gathered.transpose(0, 1), tasks


def _blocks(inputs: Tensor, gradients: Tensor) -> Iterator[Tensor]:
    """`[n, r, d_out]`, block after block of the rows of `L^T g_i`, with `L L^T = X X^T`.

    The inner products depend on the inputs only through X X^T, so L can replace X. L is `[R, R]` and
    triangular. It comes from a QR decomposition, which keeps single precision; X X^T would square the error.
    """
    lower = torch.linalg.qr(inputs.T, mode="r").R.T
    num_tasks, num_rows, width = gradients.shape
    size = max(1, min(-(-num_rows // _STEPS), BLOCK // max(1, num_tasks * width)))
    for start in range(0, num_rows, size):
        yield torch.matmul(lower[start:, start : start + size].T, gradients[:, start:])


def _of_pairs(inputs: Tensor, gradients: Tensor, tasks: Tensor, num_tasks: int, own: slice) -> Tensor:
    """The sum over pairs of the rows `own` with all rows, where each row has one task.

    A row that is not finite is left out, so the products of the other tasks stay right. Its own task is known
    to be faulty.
    """
    sound = (inputs.sum(1) + gradients.sum(1)).isfinite()[:, None]
    pairs = _inner(inputs, sound, own) * _inner(gradients, sound, own)
    of_task = (tasks[:, None] == torch.arange(num_tasks, device=tasks.device)).to(pairs.dtype)
    gram = of_task[own].T @ pairs @ of_task
    return (gram + gram.T) / 2


def _inner(rows: Tensor, sound: Tensor, own: slice) -> Tensor:
    """Inner products of the rows `own` with all rows, zero for those that are not sound.

    In float64, where squared errors do not matter, and some columns at a time: an output head may be wide.
    """
    total = torch.zeros(len(rows[own]), len(rows), dtype=stats_dtype(rows.device), device=rows.device)
    step = max(1, BLOCK // max(1, len(rows)))
    for start in range(0, rows.shape[1], step):
        part = torch.where(sound, rows[:, start : start + step], 0).to(total.dtype)
        total.addmm_(part[own], part.T)
    return total

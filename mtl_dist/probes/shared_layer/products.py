"""The tasks' gradients of a layer's weight, `A_i = Σ_s x_s^T g_i,s`, block of output columns by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 22  # numbers of a block of the gradients, over all tasks
_GROUPED = 32  # rows of one task that are multiplied together


@dataclass(frozen=True)
class Products:
    """Rows whose outer products, summed by task, are the gradients.

    Attributes:
        inputs: `[R, groups, d_in]`.
        gradients: `[q, R, groups, d_out]`: q = n where every row has a gradient of each task, else 1.
        tasks: `[R]` int64, the task of each row where q is 1; None where every row has all.
        num_tasks: n.
    """

    inputs: Tensor
    gradients: Tensor
    tasks: Tensor | None
    num_tasks: int

    def blocks(self) -> Iterator[Tensor]:
        """`[n, D_b]` columns of the gradients. Their number and widths follow from n and the layer only."""
        groups, depth = self.inputs.shape[1:]
        width = self.gradients.shape[-1]
        step = max(1, min(width, BLOCK // max(1, self.num_tasks * groups * depth)))
        with torch.autocast(self.inputs.device.type, enabled=False):
            for start in range(0, width, step):
                columns = self.gradients[..., start : start + step]
                yield self._sums(columns).reshape(self.num_tasks, -1)

    @property
    def faulty(self) -> Tensor:
        """`[n]` bool, tasks whose rows are not finite. Their sum shows it, and is cheap."""
        bad = ~(self.gradients.sum((2, 3)) + self.inputs.sum((1, 2))).isfinite()
        if self.tasks is None:
            return bad.any(1)
        counts = torch.zeros(self.num_tasks, dtype=torch.int64, device=bad.device)
        return counts.index_add_(0, self.tasks, bad[0].long()) > 0

    def _sums(self, columns: Tensor) -> Tensor:
        """`[n, groups, d_in, o]` of some columns o."""
        if self.tasks is not None:
            return grouped_products(self.inputs, columns[0], self.tasks, self.num_tasks)
        if columns.shape[2] == 1:  # a broadcast product would copy the inputs for each task
            return torch.matmul(self.inputs[:, 0].T, columns[:, :, 0])
        return torch.matmul(self.inputs.permute(1, 2, 0), columns.transpose(1, 2))


def grouped_products(left: Tensor, right: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """`Σ_{s of task i} left_s^T right_s` for every task i, at the cost of one product, without a host sync.

    Rows are sorted by task into groups of 32. Each group is multiplied, and its product is added to its task.
    The last group of a task is filled up with zeros. Shapes alone limit the number of groups.

    Args:
        left: `[R, groups, o]`.
        right: `[R, groups, d]`.
        tasks: `[R]` int64 in [0, n).
        num_tasks: n.

    Returns:
        `[n, groups, o, d]`.
    """
    num_rows = len(tasks)
    num_groups = -(-num_rows // _GROUPED) + num_tasks
    order = tasks.argsort(stable=True)
    counts = torch.zeros(num_tasks, dtype=torch.int64, device=tasks.device).index_add_(
        0, tasks, torch.ones_like(tasks)
    )
    whole = (counts + _GROUPED - 1) // _GROUPED  # groups of each task
    ends = whole.cumsum(0)
    sorted_tasks = tasks[order]
    place = torch.arange(num_rows, device=tasks.device) - (counts.cumsum(0) - counts)[sorted_tasks]
    places = (ends - whole)[sorted_tasks] * _GROUPED + place
    owner = torch.searchsorted(ends, torch.arange(num_groups, device=tasks.device), right=True)

    def placed(values: Tensor) -> Tensor:
        padded = values.new_zeros(num_groups * _GROUPED, *values.shape[1:])
        padded[places] = values[order]
        return padded.view(num_groups, _GROUPED, *values.shape[1:])

    products = torch.einsum("bkgo,bkgd->bgod", placed(left), placed(right))
    sums = products.new_zeros(num_tasks, *products.shape[1:])
    return sums.index_add_(0, owner.clamp(max=num_tasks - 1), products)

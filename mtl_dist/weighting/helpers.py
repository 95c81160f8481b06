"""Functions that several rules use; they are public, for rules outside this package too.

* Tensors with one value per task: `constant`, `per_task`.
* Reductions over the tasks present: `mean_present`, `softmax_present`.
* Solvers on the CPU: `on_present`, `to_host`.
* Random numbers that are the same on every rank: `step_generator`, `random_orders`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_dist.solvers import Array, Bools
from mtl_dist.stats import HOST, TaskStats, stats_dtype
from mtl_dist.weighting.checks import is_finite

_STRIDE = 0x9E3779B97F4A7C15  # a large odd number: neighbouring (seed, step) pairs give unrelated seeds


def constant(value: float, num_tasks: int, device: torch.device) -> Tensor:
    """`[num_tasks]` tensor filled with `value`, in the dtype of statistics on `device`."""
    return torch.full((num_tasks,), value, dtype=stats_dtype(device), device=device)


def per_task(
    values: Mapping[str, float] | Sequence[float] | None,
    tasks: Sequence[str],
    device: torch.device,
    name: str,
    *,
    default: float = 1.0,
    partial: bool = False,
) -> Tensor:
    """`[n]` tensor of a hyperparameter that has one value per task.

    Args:
        values: the values, by task name or in task order; None uses `default` for every task.
        tasks: the n task names.
        device: device of the result.
        name: rule and hyperparameter, for error messages.
        default: value of every task if `values` is None, and of the tasks that `partial` leaves out.
        partial: whether a mapping may leave out tasks.

    Raises:
        ValueError: names or length do not match the tasks, or a value is not a finite number.
    """
    if values is None:
        return constant(default, len(tasks), device)
    if isinstance(values, Mapping):
        if partial and (unknown := sorted(set(values) - set(tasks), key=repr)):
            raise ValueError(f"{name} must name tasks of {list(tasks)}, got {unknown}")
        if not partial and set(values) != set(tasks):
            raise ValueError(f"{name} must give one value for each task {list(tasks)}, got {dict(values)}")
        values = [values.get(task, default) for task in tasks]
    given: Any = values
    numbers = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
    if len(numbers) != len(tasks):
        raise ValueError(f"{name} must give one value for each task {list(tasks)}, got {values!r}")
    if not all(map(is_finite, numbers)):
        raise ValueError(f"{name} must be finite numbers, got {numbers!r}")
    tensor = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
    return tensor.to(device, stats_dtype(device))


def mean_present(values: Tensor, stats: TaskStats) -> Tensor:
    """Scalar, mean of `values` (`[n]`) over the tasks present; 0 if no task is present."""
    return torch.where(stats.present, values, torch.zeros_like(values)).sum() / stats.num_present


def softmax_present(logits: Tensor, present: Tensor) -> Tensor:
    """`[n]`, `exp(xᵢ) / Σⱼ exp(xⱼ)` over the tasks present; 0 for absent tasks.

    Args:
        logits: `[n]`, x; finite where present.
        present: `[n]` bool.
    """
    masked = logits.masked_fill(~present, -math.inf)
    top = torch.where(present.any(), masked.amax(), torch.zeros_like(masked[0]))
    # the largest term is 1: large logits do not overflow, and clamp only acts if no task is present
    terms = torch.exp(masked - top)
    return terms / terms.sum().clamp(min=1)


def on_present(solver: Callable[..., Array], stats: TaskStats, *values: Tensor) -> Tensor:
    """Weights from a solver that runs on the CPU, on the Gram matrix of the tasks present.

    Eigenvalues, active sets and random orders make a GPU wait for the host in any case, and n is small. So
    this function copies once to the host and once back, and the solver works in float64.

    Args:
        solver: a function of the Gram matrix of the m >= 1 tasks present, `[m, m]` float64, and of one `[m]`
            array for each tensor of `values`. It returns `[m]` weights.
        stats: statistics with a Gram matrix.
        values: `[n]` each, other values per task that the solver reads.

    Returns:
        `[n]` weights on the device of the statistics; 0 for absent tasks.

    Raises:
        ValueError: no gradients were measured.
    """
    gram = stats.require_gram() if stats.gram is None else stats.gram
    matrix, present, rows = to_host(gram, stats.present, *values)
    index = present.nonzero()[0]
    weights = np.zeros(len(matrix))
    if len(index):
        block = matrix[index[:, None], index]
        if gram.dtype != torch.float64:
            # rounding can make a float32 Gram indefinite; a ridge of the rounding error's size corrects that
            block[np.diag_indices_from(block)] *= 1 + len(matrix) * torch.finfo(gram.dtype).eps
        weights[index] = solver(block, *(row[index] for row in rows))
    return torch.from_numpy(weights).to(gram.device, gram.dtype, non_blocking=True)


def to_host(gram: Tensor, present: Tensor, *values: Tensor) -> tuple[Array, Bools, list[Array]]:
    """Gram, mask of the tasks present and other tensors as NumPy arrays on the CPU, floats in float64.

    On the CPU the arrays may share memory with the tensors: do not modify them.

    Args:
        gram: `[n, n]`.
        present: `[n]` bool.
        values: tensors whose last dimension is n.
    """
    if gram.device.type == HOST:
        return gram.double().numpy(), present.numpy(), [value.double().numpy() for value in values]
    return transfer(gram, present, *values)


def transfer(gram: Tensor, present: Tensor, *values: Tensor) -> tuple[Array, Bools, list[Array]]:
    """As `to_host`, with one copy from the device for all tensors together."""
    parts = [value.to(gram.dtype).reshape(-1, len(gram)) for value in (gram, present, *values)]
    host = torch.cat(parts).cpu().double().numpy()  # not every device has float64
    matrix, row, *rest = np.split(host, np.cumsum([len(part) for part in parts])[:-1])
    shaped = [piece.reshape(tuple(value.shape)) for piece, value in zip(rest, values, strict=True)]
    return matrix, row[0] > 0, shaped


def step_generator(seed: int, step: int) -> torch.Generator:
    """A torch generator on the CPU that depends only on `seed` and `step`.

    Every rank draws the same numbers, and a resumed run draws those of the interrupted run.
    """
    return torch.Generator().manual_seed((seed * _STRIDE + step) % 2**63)


def random_orders(num_tasks: int, seed: int, step: int) -> NDArray[np.intp]:
    """`[n, n]` array: each row is a random order of all n tasks, from a generator seeded by (seed, step).

    Two tasks need no random order, because each has only one other task. The rows are then `[0, 1]`.
    """
    if num_tasks <= 2:
        return np.tile(np.arange(num_tasks), (num_tasks, 1))
    generator = np.random.default_rng((seed, step))
    return generator.permuted(np.tile(np.arange(num_tasks), (num_tasks, 1)), axis=1)

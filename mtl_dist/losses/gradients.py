"""Gradients of the tasks' losses at the features, and their inner products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_dist.stats import HOST, stats_dtype

Gradients = Sequence[Tensor | None]  # one tensor per leaf of the features; None for a zero gradient

# Elements of each gradient converted at a time: n x 0.25 MB stay in a CPU's cache, n x 8 MB fill a GPU.
_CHUNK_HOST = 1 << 15
_CHUNK_DEVICE = 1 << 20
_CHUNK_FLOAT32 = 1 << 17  # where nothing is converted
_BLOCK = 1 << 11  # elements that are multiplied in float32
_LONG = 1 << 14  # elements from which the time matters


@dataclass(frozen=True)
class FeatureGradients:
    """The gradients of n losses at the features, in one of two forms.

    * One set per task (`owner` is None): set i is the gradient of the local mean loss `l_i`.
    * One set for all tasks (`owner` is given), where every sample has one task: row s of the set is the
      gradient of the sum `c_i l_i` of the task i that owns row s.

    Attributes:
        sets: n sets, or one; each has one tensor per leaf.
        counts: `[n]`, `c_i`, or whatever makes a set that of `c_i l_i`.
        owner: int64 in [0, n), the task of each row of the features, in the shape of their first dimensions.
        scale: scalar that the losses were multiplied by; None: they were not.
        row_factors: `[n]`, with one set: what the rows of each task must still be multiplied with; None: 1.
        all_count: whether the host knows that every count is positive.
    """

    sets: Sequence[Gradients]
    counts: Tensor
    owner: Tensor | None = None
    scale: Tensor | None = None
    row_factors: Tensor | None = None
    all_count: bool = False

    def gram(self) -> Tensor:
        """`[n, n]`, `c_i c_j ⟨g_i, g_j⟩`, without the loss scale; zero for tasks that are absent.

        With one set for all tasks it is diagonal, because tasks share no row of the features.
        """
        if self.owner is not None:
            squares = self._squares_by_owner(self.owner)
            if self.row_factors is not None:
                squares = torch.where(squares == 0, 0, squares * self.row_factors.square())
            return self.unscaled(torch.diag(squares))
        pairs = torch.outer(self.counts, self.counts)
        gram = pairs * self.unscaled(_products(self.sets, pairs))
        # a task with count 0 may have a NaN gradient, that of the mean over nothing
        return gram if self.all_count else gram.masked_fill(pairs == 0, 0)

    def by_task(self) -> Sequence[Gradients]:
        """The gradients of the n local mean losses, times the loss scale. n copies if there is one set."""
        if self.owner is None:
            return self.sets
        rows: list[Gradients] = []
        for task, count in enumerate(self.counts):
            own = self.owner == task
            rows.append([None if g is None else _where_rows(own, g / count) for g in self.sets[0]])
        return rows

    def unscaled(self, gram: Tensor) -> Tensor:
        """A Gram matrix of these gradients, divided by the square of the loss scale."""
        return gram if self.scale is None else gram / self.scale.to(gram.dtype).square()

    def _squares_by_owner(self, owner: Tensor) -> Tensor:
        """`[n]`, sum of the squared norms of each task's rows."""
        squares = torch.zeros_like(self.counts)
        rows = owner.flatten()
        for gradient in self.sets[0]:
            if gradient is not None:
                own = real(gradient.detach())
                flat = own.reshape(len(rows), math.prod(own.shape[owner.dim() :]))
                norms = torch.linalg.vector_norm(flat, dim=1, dtype=squares.dtype)
                squares.index_add_(0, rows, norms.square())
        return squares


def gradient_gram(rows: Sequence[Gradients], device: torch.device) -> Tensor:
    """`[n, n]` inner products of n gradients, in float64 and one chunk after the other.

    Long float32 gradients on the CPU are multiplied in float32, 2048 elements at a time, and these products
    are summed in float64: off by less than 1e-7 of the norms, at less than half the time. A float32 product
    of 10^5 elements is wrong in the 6th digit, with TF32 or autocast in the 3rd, and squares of small
    gradients underflow; so where they might, and for all other gradients, everything is float64. It takes
    n x 0.5 MB of scratch memory on the CPU, n x 16 MB on GPUs.
    """
    return _products(rows, torch.empty((), dtype=stats_dtype(device), device=device))


def real(gradient: Tensor) -> Tensor:
    """A gradient in real coordinates: those of a complex number are its two parts."""
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def _products(rows: Sequence[Gradients], like: Tensor) -> Tensor:
    """`[n, n]` inner products of n gradients, in the dtype and on the device of `like`."""
    gram: Tensor | None = None
    for leaf in zip(*rows, strict=True):
        gram = _with_products(gram, [None if g is None else real(g.detach()).flatten() for g in leaf], like)
    return like.new_zeros(len(rows), len(rows)) if gram is None else gram


def _with_products(gram: Tensor | None, vectors: Gradients, like: Tensor) -> Tensor | None:
    """`gram` with the inner products of n vectors (None for zero) added in place; None is zero."""
    length = max([v.numel() for v in vectors if v is not None], default=0)
    if length >= _LONG and like.device.type == HOST and _is_float32(vectors):
        found = _float32_products(vectors, length)
        if found is not None:
            return found if gram is None else gram.add_(found)
    size = _CHUNK_HOST if like.device.type == HOST else _CHUNK_DEVICE
    for start in range(0, length, size):
        part = _columns(vectors, start, size).to(like)
        gram = part @ part.T if gram is None else gram.addmm_(part, part.T)
    return gram


def _columns(vectors: Gradients, start: int, size: int) -> Tensor:
    """`[n, <= size]`, the columns from `start`; zeros for None."""
    given = [None if v is None else v[start : start + size] for v in vectors]
    zeros = next(part.new_zeros(()).expand_as(part) for part in given if part is not None)
    return torch.stack([zeros if part is None else part for part in given])


def _is_float32(vectors: Gradients) -> bool:
    """Whether all are float32, and products of float32 are what they say."""
    exact = torch.get_float32_matmul_precision() == "highest"
    mkldnn: Any = torch.backends.mkldnn  # torch leaves it untyped
    exact &= mkldnn.matmul.fp32_precision in ("none", "ieee")
    return exact and all(v is None or v.dtype == torch.float32 for v in vectors)


def _float32_products(vectors: Gradients, length: int) -> Tensor | None:
    """`[n, n]` in float64, from float32 products of short blocks; None where squares may be out of range."""
    n = len(vectors)
    gram = torch.zeros(n, n, dtype=torch.float64)
    with torch.autocast("cpu", enabled=False):
        for start in range(0, length, _CHUNK_FLOAT32):
            part = _columns(vectors, start, _CHUNK_FLOAT32)
            whole = part.shape[1] // _BLOCK * _BLOCK
            blocks = part[:, :whole].reshape(n, -1, _BLOCK).transpose(0, 1)
            gram += torch.bmm(blocks, blocks.transpose(1, 2)).sum(0, dtype=torch.float64)
            if whole < part.shape[1]:
                gram += part[:, whole:] @ part[:, whole:].T
    squares = [s for s, v in zip(gram.diagonal().tolist(), vectors, strict=True) if v is not None]
    # below 1e-28, elements whose square is no float32 number might matter; above 1e37 a block may overflow
    return gram if all(1e-28 * length <= square <= 1e37 for square in squares) else None


def _where_rows(own: Tensor, gradient: Tensor) -> Tensor:
    """The rows where `own` holds, else zeros."""
    own = own.reshape(*own.shape, *[1] * (gradient.dim() - own.dim()))
    return torch.where(own, gradient, torch.zeros_like(gradient))

"""How the gradients of tasks agree over a run: mean cosines, conflicts, inter-task affinity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from mtl_dist.grouping.map_equation import Array, Groups

Links = Literal["cosine", "affinity"]
_ROUNDING = 1e-6  # of a cosine in float32


@dataclass(frozen=True)
class Agreement:
    """Means over pairs of tasks, NaN if there is no pair.

    Attributes:
        pairs: number of pairs whose cosine was measured.
        cosine: mean of their mean cosines.
        conflict: mean fraction of the steps in which the cosine is negative.
    """

    pairs: int
    cosine: float
    conflict: float


@dataclass(frozen=True)
class Affinities:
    """Pairs of tasks, averaged over the steps in which both have a gradient.

    Attributes:
        tasks: names of the n tasks.
        cosines: `[n, n]`, mean cosine of the gradients; NaN for pairs never measured, 1 on the diagonal.
        conflicts: `[n, n]`, fraction of the steps with a negative cosine; NaN as above, 0 on the diagonal.
        affinity: `[n, n]`, mean of `Gᵢⱼ / Lⱼ`, by which part the loss of task j falls per unit of learning
            rate in a small step along the gradient of task i alone; NaN where not measured, or `Lⱼ <= 0`.
            Fifty et al., NeurIPS 2021 (TAG), measure `Zᵢⱼ = 1 - Lⱼ(θ - η gᵢ) / Lⱼ(θ)`, which is η times this
            to first order. It depends on the units of the losses; cosines do not.
        steps: number of steps with a measured pair.
    """

    tasks: tuple[str, ...]
    cosines: Array
    conflicts: Array
    affinity: Array
    steps: int

    @classmethod
    def measure(
        cls, tasks: Sequence[str], cosines: npt.ArrayLike, norms: npt.ArrayLike, losses: npt.ArrayLike
    ) -> Affinities:
        """From what S steps recorded; NaN is a value that a step did not have.

        Args:
            tasks: n names.
            cosines: `[S, n, n]`, cosines of the gradients; the diagonal is not read.
            norms: `[S, n]`, lengths of the gradients.
            losses: `[S, n]`.

        Raises:
            ValueError: another shape, or a value that cannot be: a cosine outside [-1, 1], a negative norm,
                an infinity.
        """
        return cls.over(tasks, [(cosines, norms, losses)])

    @classmethod
    def over(
        cls, tasks: Sequence[str], parts: Iterable[tuple[npt.ArrayLike, npt.ArrayLike, npt.ArrayLike]]
    ) -> Affinities:
        """As `measure`, over the steps of all parts: a long run of many tasks fits into memory only in parts.

        Args:
            tasks: n names.
            parts: cosines, norms and losses of some steps each, in the shapes of `measure`.

        Raises:
            ValueError: as `measure`.
        """
        n, steps = len(tasks), 0
        cosines, conflicts, affinity = _Mean(n), _Mean(n), _Mean(n)
        diagonal = np.arange(n)
        for part in parts:
            cosine, norm, loss = (np.array(values, dtype=np.float64) for values in part)
            shape = (len(cosine), n) if cosine.ndim else (0, n)
            if cosine.shape == (*shape, n):
                cosine[:, diagonal, diagonal] = np.nan
            _check("cosines", cosine, (*shape, n), -1, 1)
            _check("norms", norm, shape, 0, np.inf)
            _check("losses", loss, shape, -np.inf, np.inf)
            measured = np.isfinite(cosine)
            steps += int(measured.any((1, 2)).sum())
            cosines.add(cosine)
            conflicts.add(np.where(measured, (cosine < 0) * 1.0, np.nan))
            cosine[:, diagonal, diagonal] = 1.0
            gram = cosine * norm[:, :, None] * norm[:, None, :]
            affinity.add(gram / np.where(loss > 0, loss, np.nan)[:, None, :])
        mean, conflict = cosines.value(), conflicts.value()
        mean[diagonal, diagonal], conflict[diagonal, diagonal] = 1.0, 0.0
        return cls(tuple(tasks), mean, conflict, affinity.value(), steps)

    def links(self, kind: Links = "cosine") -> Array:
        """`[n, n]` link weights for `find_groups`: the positive part of the cosine or of the affinity.

        The affinity is averaged over both directions. Pairs that were never measured have no link.

        Raises:
            ValueError: another kind, or no pair was measured.
        """
        if kind not in get_args(Links):
            raise ValueError(f"links must be 'cosine' or 'affinity', got {kind!r}")
        matrix = self.cosines if kind == "cosine" else (self.affinity + self.affinity.T) / 2
        if not np.isfinite(matrix[np.triu_indices(len(matrix), 1)]).any():
            raise ValueError(
                "no cosine of two tasks was recorded: train with a rule that reads gradients, such as "
                "inverse_grad_norm, in steps that have several tasks"
            )
        links: Array = np.where(np.isfinite(matrix), np.maximum(matrix, 0), 0)
        np.fill_diagonal(links, 0.0)
        return links

    def agreement(self, groups: Groups, *, inside: bool) -> Agreement:
        """Over the pairs of tasks in the same group (`inside`), or in different groups."""
        group = {task: number for number, members in enumerate(groups) for task in members}
        pairs = [
            (i, j)
            for i, j in combinations(range(len(self.tasks)), 2)
            if (group[i] == group[j]) is inside and np.isfinite(self.cosines[i, j])
        ]
        if not pairs:
            return Agreement(0, np.nan, np.nan)
        a, b = np.transpose(pairs)
        return Agreement(len(pairs), float(self.cosines[a, b].mean()), float(self.conflicts[a, b].mean()))


def _check(name: str, values: Array, shape: tuple[int, ...], low: float, high: float) -> None:
    """Raises `ValueError` for values of another shape, infinite ones, and those outside the range."""
    if values.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, got {list(values.shape)}")
    wrong = np.isinf(values) | (values < low - _ROUNDING) | (values > high + _ROUNDING)
    if wrong.any():
        raise ValueError(f"{name} must be finite and in [{low}, {high}], or NaN, got {values[wrong][0]}")


class _Mean:
    """`[n, n]`, means over the steps that have a value; NaN where none has."""

    def __init__(self, n: int) -> None:
        self._total, self._count = np.zeros((n, n)), np.zeros((n, n))

    def add(self, values: Array) -> None:
        """Takes in some steps, `[S, n, n]`."""
        there = np.isfinite(values)
        self._count += there.sum(0)
        self._total += np.where(there, values, 0.0).sum(0)

    def value(self) -> Array:
        """The means so far."""
        mean: Array = np.where(self._count > 0, self._total / np.maximum(self._count, 1), np.nan)
        return mean

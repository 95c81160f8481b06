"""Thins long runs: minima and maxima for the lines, means for smoothing and for the cosines."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mtl_dist.tracking.report.read import Floats, Steps

MISSING = -32768  # a missing cosine; cosines are stored as multiples of 1e-4


@dataclass(frozen=True)
class Buckets:
    """Groups of consecutive rows. The first and the last row are groups of their own, so they are exact.

    Attributes:
        starts: `[B]` index of the first row of each group.
        num_rows: number of rows of the run.
    """

    starts: npt.NDArray[np.intp]
    num_rows: int

    @staticmethod
    def of(num_rows: int, most: int) -> Buckets:
        """At most `most >= 3` buckets of nearly equal size; one row each if `num_rows <= most`."""
        if num_rows <= most:
            return Buckets(np.arange(num_rows), num_rows)
        inner = most - 2
        edges = 1 + np.arange(inner + 1) * (num_rows - 2) // inner
        return Buckets(np.concatenate([[0], edges]), num_rows)

    @property
    def is_whole(self) -> bool:
        """Whether each bucket has one row, so that nothing is lost."""
        return len(self.starts) == self.num_rows

    @property
    def ends(self) -> npt.NDArray[np.intp]:
        """`[B]` index of the last row of each bucket."""
        return np.append(self.starts[1:], self.num_rows) - 1

    @property
    def slots(self) -> npt.NDArray[np.intp]:
        """Rows at whose steps minimum and maximum are drawn: the first and the last row of each bucket."""
        return np.unique(np.concatenate([self.starts, self.ends]))

    def extremes(self, column: Floats) -> Floats:
        """Minimum and maximum of each bucket, in the order in which they occur; NaN if it has no value."""
        starts, rows = self.starts, np.arange(self.num_rows)
        low, high = np.fmin.reduceat(column, starts), np.fmax.reduceat(column, starts)
        bucket = np.searchsorted(starts, rows, side="right") - 1
        first_low = np.minimum.reduceat(np.where(column == low[bucket], rows, self.num_rows), starts)
        first_high = np.minimum.reduceat(np.where(column == high[bucket], rows, self.num_rows), starts)
        falls = first_high < first_low
        pairs = np.stack([np.where(falls, high, low), np.where(falls, low, high)], axis=1)
        two = self.ends > starts
        return pairs[np.stack([np.ones_like(two), two], axis=1)]

    def means(self, column: Floats) -> Floats:
        """Mean of each bucket over the rows that have a value; NaN if none has."""
        finite = np.isfinite(column)
        total = np.add.reduceat(np.where(finite, column, 0).astype(np.float64), self.starts)
        count = np.add.reduceat(finite.astype(np.float64), self.starts)
        mean = np.full(len(total), np.nan)
        np.divide(total, count, out=mean, where=count > 0)
        return mean.astype(np.float32)


class Series:
    """Encodes the columns of a run for the page: `{"x": grid, "v": values}`, and means if the run is thinned.

    A grid is the steps of some values. Columns share grids: `grids` has each grid once, in base64.
    """

    def __init__(self, steps: Steps, most_values: int) -> None:
        self.grids: list[str] = []
        self._steps = steps
        # three values per bucket: minimum, maximum, mean
        whole = len(steps) <= most_values
        self.buckets = Buckets.of(len(steps), len(steps) if whole else max(3, most_values // 3))

    def encode(self, column: Floats) -> dict[str, Any]:
        """Encodes one column. A column with few values keeps all of them, at their own steps."""
        rows, buckets = np.flatnonzero(np.isfinite(column)), self.buckets
        slots = buckets.slots
        if 4 * len(rows) <= len(slots):
            return {"x": self._grid(self._steps[rows]), "v": encode(column[rows])}
        if buckets.is_whole:
            return {"x": self._grid(self._steps), "v": encode(column)}
        return {
            "x": self._grid(self._steps[slots]),
            "v": encode(buckets.extremes(column)),
            "mx": self._grid(self._steps[buckets.starts]),
            "m": encode(buckets.means(column)),
        }

    def _grid(self, steps: Steps) -> int:
        text = encode(steps.astype(np.float64))
        if text not in self.grids:
            self.grids.append(text)
        return self.grids.index(text)


def cosine_frames(steps: Steps, columns: list[Floats], most: int) -> dict[str, Any]:
    """Means over at most `most` groups of rows, `[frames, pairs]` in units of 1e-4, with their steps."""
    buckets = Buckets.of(len(steps), max(3, most))
    frames = np.stack([buckets.means(column) for column in columns], axis=1)
    tenths = np.where(np.isfinite(frames), np.clip(np.round(frames * 1e4), -10000, 10000), MISSING)
    return {
        "from": encode(steps[buckets.starts]),
        "to": encode(steps[buckets.ends]),
        "v": encode(tenths.astype(np.int16)),
    }


def encode(values: npt.NDArray[Any]) -> str:
    """Little-endian bytes in base64."""
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")

"""A random linear sketch: inner products of long vectors from short ones.

CountSketch (Charikar, Chen and Farach-Colton, ICALP 2002) in a form without scattered writes. Coordinate k of
a vector goes, with a random sign, to entry `(k + shift of its block) mod m` of m, where blocks are m
coordinates long:

    y_j = Σ_k [h(k) = j] σ(k) x_k,     h(k) = (k + shift(⌊k / m⌋)) mod m,     σ(k) = ±1

Coordinates of one block never meet, those of different blocks meet with probability 1/m. With that and
independent signs, for any vectors a and b,

    E⟨Sa, Sb⟩ = ⟨a, b⟩,     Var⟨Sa, Sb⟩ <= (|a|² |b|² + ⟨a, b⟩²) / m <= 2 |a|² |b|² / m

so the error relative to |a| |b| has a standard deviation of at most √(2/m), whatever the length. The map is
linear: sketches add over parts of a vector, over micro-batches and over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 64  # signs from one hash value
_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True)
class CountSketch:
    """One draw of the sketch, the same on every rank and device, for vectors of any length.

        total = sketch.zeros(n, device)
        sketch.add_(total, first_columns, 0)
        sketch.add_(total, next_columns, first_columns.shape[1])
        rows = sketch.fold(total)  # [n, m]

    Attributes:
        size: m, numbers of a sketch.
        seed: which draw.
    """

    size: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a sketch needs at least 1 number, got size={self.size}")

    def zeros(self, num_rows: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """`[num_rows, 2 m]`, to be added to: every block lands in one piece, and `fold` takes the modulus."""
        return torch.zeros(num_rows, 2 * self.size, device=device, dtype=dtype)

    def add_(self, total: Tensor, rows: Tensor, offset: int) -> None:
        """Adds the sketch of coordinates `offset ... offset + D - 1` to `total`, in place.

        Args:
            total: `[n, 2 m]` from `zeros`, or a slice of its rows.
            rows: `[n, D]`, these coordinates of n vectors; any floating-point dtype.
            offset: index of the first column in the whole vector.
        """
        end = offset + rows.shape[1]
        first_block = offset // self.size
        shifts = self._shifts(first_block, -(-end // self.size))
        signs = self._signs(offset, end, total.device, total.dtype)
        for block, shift in enumerate(shifts, start=first_block):
            low, high = max(block * self.size, offset), min((block + 1) * self.size, end)
            start = low - block * self.size + shift
            piece, columns = total[:, start : start + high - low], slice(low - offset, high - offset)
            piece.addcmul_(rows[:, columns].to(total.dtype), signs[columns])

    def fold(self, total: Tensor) -> Tensor:
        """`[n, m]` sketches from what was added up."""
        return total[:, : self.size] + total[:, self.size :]

    def _shifts(self, first: int, last: int) -> list[int]:
        """`shift(b)` in [0, m) of blocks `first ... last - 1`."""
        hashes = _mix(_mix(torch.arange(first, last)) ^ _mix(torch.tensor(2 * self.seed + 1)))
        shifts: list[int] = ((hashes & _MASK32) % self.size).tolist()
        return shifts

    def _signs(self, start: int, end: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`σ(k)` for k = start ... end - 1."""
        words = torch.arange(start // _WORD, -(-end // _WORD), device=device)
        seed = _mix(torch.tensor(2 * self.seed)).to(device, non_blocking=True)
        octets = _mix(_mix(words) ^ seed).view(torch.uint8).to(torch.int32)
        signs = _sign_table(device, dtype).index_select(0, octets).view(-1)
        begin = start % _WORD
        return signs[begin : begin + end - start]


def size_for(relative_error: float) -> int:
    """The m for which the standard deviation of `⟨Sa, Sb⟩ / (|a| |b|)` is at most `relative_error`."""
    if not 0 < relative_error <= 1:
        raise ValueError(f"relative_error must be in (0, 1], got {relative_error}")
    return math.ceil(2 / relative_error**2)


def _mix(values: Tensor) -> Tensor:
    """A bijection of int64 that looks random: the step of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    values = values + _signed(0x9E3779B97F4A7C15)
    values = (values ^ _shifted(values, 30)) * _signed(0xBF58476D1CE4E5B9)
    values = (values ^ _shifted(values, 27)) * _signed(0x94D049BB133111EB)
    return values ^ _shifted(values, 31)


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word; products wrap around in torch, as they must here."""
    return word - (1 << 64) if word >> 63 else word


def _shifted(values: Tensor, by: int) -> Tensor:
    """A logical shift: torch's keeps the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def _sign_table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`[256, 8]`, the bits of a byte as signs."""
    bits = (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)) & 1
    return (2 * bits - 1).to(dtype)

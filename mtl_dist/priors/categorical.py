"""Initial and prior loss of K-class cross-entropy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.priors._base import LabelStatistics, entropy


@dataclass(eq=False)
class Categorical(LabelStatistics):
    """Labels of `F.cross_entropy(logits, labels, ...)` with its default mean reduction.

    With `n_k` labels of class k, the initial loss is `log K` and the prior loss `-Σ_k p_k log p_k`,
    `p_k = n_k / Σ n` (https://kexue.fm/archives/8870). With class weights `w` and label smoothing `ε`, a
    constant prediction q costs `Σ_k a_k (-log q_k)` with

        a_k = ((1 - ε) w_k n_k + (ε / K) w_k Σ_j n_j) / Σ_j w_j n_j

    so the initial loss is `A log K`, `A = Σ_k a_k`, and the prior loss is `-Σ_k a_k log(a_k / A)`.

    `update` takes class indices of any shape; every element is a label: an integer or a whole float.

    Attributes:
        num_classes: K.
        ignore_index: labels with this value are ignored, as in `F.cross_entropy`.
        weight: `[K]` class weights >= 0, or None for 1.
        label_smoothing: ε in [0, 1].

    Raises:
        ValueError: a field is out of range.
    """

    num_classes: int
    ignore_index: int = -100
    weight: Sequence[float] | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if self.weight is not None:
            self.weight = tuple(float(value) for value in self.weight)
            if len(self.weight) != self.num_classes or not all(0 <= w < math.inf for w in self.weight):
                raise ValueError(
                    f"weight must give {self.num_classes} finite numbers >= 0, got {self.weight}"
                )
        super().__post_init__()

    @property
    def _num_sums(self) -> int:
        return self.num_classes

    @property
    def _valid(self) -> str:
        return f"whole numbers from 0 to {self.num_classes - 1} or ignore_index {self.ignore_index}"

    def _measured(self, labels: Tensor) -> Self:
        labels = labels.reshape(-1).double()
        kept = labels != self.ignore_index
        known = (labels >= 0) & (labels < self.num_classes) & (labels == labels.floor())
        counted = kept & known
        index = torch.where(counted, labels, 0).long()
        # n_k = Σ_i [y_i = k]; bincount would wait for the device
        counts = labels.new_zeros(self.num_classes).index_add_(0, index, counted.double())
        return self._part(labels, counted, kept & ~known, counts)

    def _losses(self, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.ones_like(sums) if self.weight is None else sums.new_tensor(self.weight)
        weighted = weight * sums
        if not weighted.sum() > 0:
            raise ValueError(f"{self!r}: every label seen has class weight 0")
        smooth = self.label_smoothing
        # a_k = ((1 - ε) w_k n_k + (ε / K) w_k Σ_j n_j) / Σ_j w_j n_j
        masses = ((1 - smooth) * weighted + smooth / self.num_classes * weight * sums.sum()) / weighted.sum()
        return masses.sum() * math.log(self.num_classes), entropy(masses)

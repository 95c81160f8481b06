"""Initial and prior loss of binary and of multi-label classification."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from mtl_dist.priors._base import LabelStatistics, entropy


@dataclass(eq=False)
class _Bernoulli(LabelStatistics):
    """L labels per sample. Each is 0, 1, a probability in between, or missing."""

    missing: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.missing is not None and 0 <= self.missing <= 1:
            raise ValueError(f"missing must be outside [0, 1], the range of labels, got {self.missing}")
        super().__post_init__()

    @property
    def _width(self) -> int:
        """L."""
        return 1

    @property
    def _num_sums(self) -> int:
        return 2 * self._width  # mass of ones, then mass of zeros

    @property
    def _valid(self) -> str:
        return "from 0 to 1" + ("" if self.missing is None else f" or missing ({self.missing:g})")

    def _measured(self, labels: Tensor) -> Self:
        labels = labels.reshape(-1, self._width).double()
        kept = ~self._is_missing(labels)
        known = (labels >= 0) & (labels <= 1)
        counted = kept & known
        # the loss is linear in the label: a label of 0.3 counts as 0.3 of a one and 0.7 of a zero
        ones, zeros = (torch.where(counted, mass, 0).sum(0) for mass in (labels, 1 - labels))
        return self._part(labels, counted, kept & ~known, torch.cat([ones, zeros]))

    def _is_missing(self, labels: Tensor) -> Tensor:
        if self.missing is None:
            return torch.zeros_like(labels, dtype=torch.bool)
        return labels.isnan() if math.isnan(self.missing) else labels == self.missing

    def _losses(self, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        masses = sums.reshape(2, self._width).T
        # Σ_l n_l H(p_l) / Σ_l n_l
        return sums.new_tensor(math.log(2)), entropy(masses).sum() / masses.sum()


@dataclass(eq=False)
class Binary(_Bernoulli):
    """Labels of `F.binary_cross_entropy_with_logits(logits, labels)`, with one constant logit.

    Initial loss `log 2` and prior loss `H(p) = -p log p - (1 - p) log(1 - p)`, with the rate p of
    positive labels (https://kexue.fm/archives/8870, K = 2).

    `update` takes labels of any shape; every element is a label: 0, 1, bool, a probability in between, or
    `missing`.

    Attributes:
        missing: the value of missing labels, which the loss masks out, such as -1 or NaN. None: no label is
            missing.

    Raises:
        ValueError: `missing` is in [0, 1].
    """


@dataclass(eq=False)
class MultiLabel(_Bernoulli):
    """Labels of `F.binary_cross_entropy_with_logits(logits, labels)`, with one constant logit per label.

    Initial loss `log 2` and prior loss `Σ_l n_l H(p_l) / Σ_l n_l`, where `n_l` is the number of given labels
    l and `p_l` their positive rate: the mean over the given labels. It is the mean over l if no label is
    missing (https://kexue.fm/archives/8870, K = 2 for each label).

    `update` takes `[..., L]`: 0, 1, bool, probabilities in between, or `missing`.

    Attributes:
        num_labels: L.
        missing: the value of missing labels, which the loss masks out, such as -1 or NaN. None: no label is
            missing.

    Raises:
        ValueError: a field is out of range, or the last dimension of labels is not L.
    """

    num_labels: int

    def __post_init__(self) -> None:
        if self.num_labels < 1:
            raise ValueError(f"num_labels must be at least 1, got {self.num_labels}")
        super().__post_init__()

    @property
    def _width(self) -> int:
        return self.num_labels

    def _measured(self, labels: Tensor) -> Self:
        if labels.ndim == 0 or labels.shape[-1] != self.num_labels:
            raise ValueError(f"{self!r} takes labels [..., {self.num_labels}], got {list(labels.shape)}")
        return super()._measured(labels)

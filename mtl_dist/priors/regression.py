"""Initial and prior loss of L2 regression."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from mtl_dist.priors._base import LabelStatistics


@dataclass(eq=False)
class Regression(LabelStatistics):
    """Targets of `F.mse_loss(outputs, targets)`, one vector of D elements per sample.

    The initial loss is `E‖y‖²` and the prior loss `E‖y - μ‖²`, `μ = E y` (https://kexue.fm/archives/8870).
    Both are divided by D if the loss is the mean over elements. The best constant is a vector: each element
    has its own mean.

    `update` takes `[batch, ...]` with D elements per sample. D is an argument, so that a rank without samples
    knows it.

    Attributes:
        size: D, number of elements of one sample's target; 1 for a scalar.
        reduction: "mean" over the elements, as in `nn.MSELoss()`, or "sum" over the elements of a sample
            (and the mean over samples).

    Raises:
        ValueError: a field is out of range, or labels do not have D elements per sample.
    """

    size: int = 1
    reduction: Literal["mean", "sum"] = "mean"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {self.size}")
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {self.reduction!r}")
        super().__post_init__()

    @property
    def _num_sums(self) -> int:
        return 1 + self.size  # samples, then the sum of each element

    @property
    def _valid(self) -> str:
        return "finite"

    def _measured(self, labels: Tensor) -> Self:
        if labels.ndim == 0 or labels[0].numel() != self.size:
            raise ValueError(
                f"{self!r} takes labels [batch, ...] of {self.size} elements per sample, got shape "
                f"{list(labels.shape)}; give size= for vectors, or flatten if every element is a sample"
            )
        labels = labels.reshape(-1, self.size).double()
        samples = labels.new_full((1,), len(labels))
        total = labels.sum(0)
        finite = labels.isfinite()
        part = self._part(labels, finite, ~finite, torch.cat([samples, total]))
        # S = Σ_i ‖y_i - T / n‖²
        part._squares = (labels - total / samples).square().sum()
        return part

    def squares_about(self, total: Tensor) -> Tensor:
        """Scalar, `S + n ‖T / n - μ‖²` with the mean μ of `total`."""
        num, mean = self._moments(self._sums)
        _, center = self._moments(total)
        # S_p + n_p ‖T_p / n_p - T / n‖²
        return self._squares + num * (mean - center).square().sum()

    def _losses(self, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        num, mean = self._moments(sums)
        elements = self.size if self.reduction == "mean" else 1
        # E‖y - μ‖² = S / n
        variance = squares / num
        # E‖y‖² = S / n + ‖μ‖²
        return (variance + mean.square().sum()) / elements, variance / elements

    def _moments(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Number of samples (scalar) and mean `[D]` (0 if there are no samples)."""
        num, total = sums[-1 - self.size], sums[-self.size :]
        return num, total / num.clamp(min=1)

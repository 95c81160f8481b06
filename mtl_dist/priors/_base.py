"""What every accumulator of label statistics shares: streaming, merging, and the two losses.

An accumulator holds a vector of sums, which add, and one scalar of squares about its own mean, which does not
(Chan, Golub and LeVeque 1979): moved to a common mean it adds too,

    T = Σ_p T_p
    S = Σ_p (S_p + n_p ‖T_p / n_p - T / n‖²)

The parts p are batches, accumulators or ranks: `update`, `+` and `synchronize` are this one pair of sums.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from mtl_dist.priors._agreement import check_agreement
from mtl_dist.sync import all_reduce_sum, collective_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

S = TypeVar("S", bound="LabelStatistics")

_HEADER = 3  # labels counted, labels refused, sum of the refused ones


@dataclass(eq=False)
class LabelStatistics(ABC):
    """Statistics of one task's labels, from which its initial and its prior loss follow.

    Fields of subclasses say how the task's loss is defined. Sums are float64, live on the device of the
    latest labels, and are read back only by the properties, so `update` never waits for a device.
    """

    _sums: Tensor = field(init=False, repr=False)  # `[3 + s]`: the header, then what the subclass sums
    _squares: Tensor = field(init=False, repr=False)  # scalar, about the mean of these labels

    def __post_init__(self) -> None:
        self._sums = torch.zeros(_HEADER + self._num_sums, dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, labels: Tensor) -> None:
        """Counts the labels of one batch in. Nothing is read back to the host.

        Labels that are out of range or not finite are counted too, and raise when a loss is read.

        Args:
            labels: any device and any real dtype, in the shape the class states; may be empty.

        Raises:
            ValueError: the shape is not the one the class states.
        """
        if labels.numel() == 0:
            return
        labels = labels.detach()
        if labels.device.type == "mps":  # no float64 there
            labels = labels.cpu()
        here, batch = self._to(labels.device), self._measured(labels)
        self._sums, self._squares = combined([here, batch])

    def __add__(self, other: Self) -> Self:
        """Statistics of the labels of both, as a new object.

        Raises:
            ValueError: the two define different losses.
        """
        if repr(self) != repr(other):
            raise ValueError(f"only statistics of the same loss add, got {self!r} and {other!r}")
        return self.holding(*combined([self, other._to(self._sums.device)]))

    def synchronize(self, group: ProcessGroup | None = None) -> Self:
        """Statistics of the labels of all ranks, as a new object; a collective, to be called on every rank.

        Args:
            group: the data-parallel ranks; None for all.

        Raises:
            ValueError: on every rank, where ranks define different losses.
        """
        return synchronize({"labels": self}, group)["labels"]

    def empty(self) -> Self:
        """The same loss, no labels yet."""
        return replace(self)

    @property
    def count(self) -> int:
        """Number of labels (elements, for vectors) counted: those neither ignored nor refused."""
        return int(self._sums[0].item())

    @property
    def initial_loss(self) -> float:
        """Loss of a model that knows nothing: all logits, or all outputs, are zero.

        Raises:
            ValueError: no labels, or labels out of range or not finite.
        """
        return self._losses(*self._checked())[0].item()

    @property
    def prior_loss(self) -> float:
        """Loss of the best constant prediction: the label marginal. 0 where all labels are the same.

        Raises:
            ValueError: no labels, or labels out of range or not finite.
        """
        return self._losses(*self._checked())[1].item()

    def holding(self, sums: Tensor, squares: Tensor) -> Self:
        """The same loss with these sums, `[3 + s]` and scalar."""
        new = self.empty()
        new._sums, new._squares = sums, squares
        return new

    def squares_about(self, total: Tensor) -> Tensor:
        """Scalar, the squares about the mean of `total`, the sums of all parts; 0 where a loss needs none."""
        return self._squares

    @property
    @abstractmethod
    def _num_sums(self) -> int:
        """Number s of sums besides the header."""

    @property
    @abstractmethod
    def _valid(self) -> str:
        """Which labels are allowed, as the words after "labels must be"."""

    @abstractmethod
    def _measured(self, labels: Tensor) -> Self:
        """Statistics of one batch, not empty."""

    @abstractmethod
    def _losses(self, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Initial and prior loss, scalars, from the `[s]` sums without header and the squares."""

    def _checked(self) -> tuple[Tensor, Tensor]:
        sums, squares = self._sums.cpu(), self._squares.cpu()
        counted, refused, refused_sum = sums[:_HEADER].tolist()
        if refused:
            raise ValueError(
                f"{self!r}: labels must be {self._valid}; {refused:.0f} of {counted + refused:.0f} are not, "
                f"their mean is {refused_sum / refused:g}"
            )
        if not counted:
            raise ValueError(f"{self!r}: no labels were counted; call `update` with labels first")
        return sums[_HEADER:], squares

    def _to(self, device: torch.device) -> Self:
        return self.holding(self._sums.to(device), self._squares.to(device))

    def _part(self, labels: Tensor, counted: Tensor, refused: Tensor, sums: Tensor) -> Self:
        """Statistics of labels, from masks of those counted and refused, and the `[s]` sums."""
        refused_sum = torch.where(refused, labels, 0).sum()
        header = torch.stack([counted.sum(), refused.sum(), refused_sum]).to(sums.dtype)
        return self.holding(torch.cat([header, sums]), sums.new_zeros(()))


def synchronize(statistics: Mapping[str, S], group: ProcessGroup | None = None) -> dict[str, S]:
    """Statistics of the labels of all ranks, by task; a collective, to be called on every rank.

    Three all-reduces, whose sizes depend on the tasks alone: a comparison of the tasks, all sums, all squares
    about the global means.

    Args:
        statistics: of this rank, by task name; any of them may have seen no labels.
        group: the data-parallel ranks; None for all.

    Raises:
        ValueError: on every rank, where ranks have different tasks or define different losses.
    """
    device = collective_device(group)
    check_agreement({task: repr(one) for task, one in statistics.items()}, device, group)
    local = [one._to(device) for one in statistics.values()]
    # T = Σ_r T_r
    packed = all_reduce_sum(torch.cat([one._sums for one in local]), group)
    sums = torch.split(packed, [len(one._sums) for one in local])
    # S = Σ_r (S_r + n_r ‖T_r / n_r - T / n‖²)
    about = torch.stack([one.squares_about(total) for one, total in zip(local, sums, strict=True)])
    squares = all_reduce_sum(about, group)
    return {
        task: one.holding(total.cpu(), square.cpu())
        for task, one, total, square in zip(statistics, local, sums, squares, strict=True)
    }


def combined(parts: Sequence[LabelStatistics]) -> tuple[Tensor, Tensor]:
    """Sums and squares of all parts together."""
    # T = Σ_p T_p
    sums = _sum(part._sums for part in parts)
    # S = Σ_p (S_p + n_p ‖T_p / n_p - T / n‖²)
    return sums, _sum(part.squares_about(sums) for part in parts)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def entropy(masses: Tensor) -> Tensor:
    """`Σ_k a_k (-log(a_k / A))` with `A = Σ_k a_k`, over the last dimension; masses >= 0, 0 where all are 0.

    This is the least value of `Σ_k a_k (-log q_k)` over distributions q, reached at `q = a / A`.
    """
    total = masses.sum(-1, keepdim=True)
    shares = masses / torch.where(total > 0, total, 1)
    # -a_k log(a_k / A), and 0 log 0 = 0
    terms: Tensor = -torch.special.xlogy(masses, shares)
    return terms.sum(-1)

"""The base of all accumulators of label statistics: streaming, merging, all ranks, and the two losses.

An accumulator has a vector of sums and one scalar, the squares about its own mean. The sums of two
accumulators add. The squares add only about a common mean (Chan, Golub and LeVeque 1979):

    T = Σ_p T_p
    S = Σ_p (S_p + n_p ‖T_p / n_p - T / n‖²)

The parts p are batches (`update`), accumulators (`+`) or ranks (`synchronize`).
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

_HEADER = 3  # number of counted labels, number of invalid labels, sum of the invalid labels


@dataclass(eq=False)
class LabelStatistics(ABC):
    """Label statistics of one task. Its initial loss and its prior loss follow from them.

    The fields of a subclass define the loss of the task. Sums are float64 and are on the device of the latest
    labels. Only the properties read them, so `update` never waits for a device.
    """

    _sums: Tensor = field(init=False, repr=False)  # `[3 + s]`: the header, then the sums of the subclass
    _squares: Tensor = field(init=False, repr=False)  # scalar: squares about the mean of these labels

    def __post_init__(self) -> None:
        self._sums = torch.zeros(_HEADER + self._num_sums, dtype=torch.float64)
        self._squares = torch.zeros((), dtype=torch.float64)

    def update(self, labels: Tensor) -> None:
        """Adds the labels of one batch. Nothing is copied to the host.

        Labels that are out of range or not finite are counted too. They raise an error when a loss is read.

        Args:
            labels: any device, any real dtype, in the shape that the class documents; may be empty.

        Raises:
            ValueError: the labels have another shape.
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
            raise ValueError(f"only statistics of the same loss can be added, got {self!r} and {other!r}")
        return self.holding(*combined([self, other._to(self._sums.device)]))

    def synchronize(self, group: ProcessGroup | None = None) -> Self:
        """Statistics of the labels of all ranks, as a new object. A collective: call it on every rank.

        Args:
            group: the data-parallel ranks; None for all.

        Raises:
            ValueError: on every rank, if ranks define different losses.
        """
        return synchronize({"labels": self}, group)["labels"]

    def empty(self) -> Self:
        """The same loss, without labels."""
        return replace(self)

    @property
    def count(self) -> int:
        """Number of counted labels (elements, for vectors), without ignored and invalid ones."""
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
        """Loss of the best constant prediction, the label marginal. 0 if all labels are the same.

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
        """Scalar: squares about the mean of `total`, the sums of all parts. 0 if the loss needs none."""
        return self._squares

    @property
    @abstractmethod
    def _num_sums(self) -> int:
        """Number s of sums besides the header."""

    @property
    @abstractmethod
    def _valid(self) -> str:
        """The allowed labels, as the words after "labels must be"."""

    @abstractmethod
    def _measured(self, labels: Tensor) -> Self:
        """Statistics of one batch that is not empty."""

    @abstractmethod
    def _losses(self, sums: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
        """Initial and prior loss, scalars, from the `[s]` sums without the header, and the squares."""

    def _checked(self) -> tuple[Tensor, Tensor]:
        sums, squares = self._sums.cpu(), self._squares.cpu()
        counted, refused, refused_sum = sums[:_HEADER].tolist()
        if refused:
            raise ValueError(
                f"{self!r}: labels must be {self._valid}; {refused:.0f} of {counted + refused:.0f} are not, "
                f"and their mean is {refused_sum / refused:g}"
            )
        if not counted:
            raise ValueError(f"{self!r}: no labels yet; call `update` with labels first")
        return sums[_HEADER:], squares

    def _to(self, device: torch.device) -> Self:
        return self.holding(self._sums.to(device), self._squares.to(device))

    def _part(self, labels: Tensor, counted: Tensor, refused: Tensor, sums: Tensor) -> Self:
        """Statistics of labels, from the masks of counted and invalid labels, and the `[s]` sums."""
        refused_sum = torch.where(refused, labels, 0).sum()
        header = torch.stack([counted.sum(), refused.sum(), refused_sum]).to(sums.dtype)
        return self.holding(torch.cat([header, sums]), sums.new_zeros(()))


def synchronize(statistics: Mapping[str, S], group: ProcessGroup | None = None) -> dict[str, S]:
    """Statistics of the labels of all ranks, by task. A collective: call it on every rank.

    It makes three all-reduces: a comparison of the tasks, all sums, and all squares about the global means.
    Their sizes depend only on the tasks.

    Args:
        statistics: task -> statistics of this rank. Any of them may have no labels.
        group: the data-parallel ranks; None for all.

    Raises:
        ValueError: on every rank, if ranks have different tasks or define different losses.
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
    """Sums and squares over all parts."""
    # T = Σ_p T_p
    sums = _sum(part._sums for part in parts)
    # S = Σ_p (S_p + n_p ‖T_p / n_p - T / n‖²)
    return sums, _sum(part.squares_about(sums) for part in parts)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def entropy(masses: Tensor) -> Tensor:
    """`Σ_k a_k (-log(a_k / A))`, `A = Σ_k a_k`, over the last dimension; masses >= 0; 0 if all are 0.

    This is the minimum of `Σ_k a_k (-log q_k)` over distributions q. It is reached at `q = a / A`.
    """
    total = masses.sum(-1, keepdim=True)
    shares = masses / torch.where(total > 0, total, 1)
    # -a_k log(a_k / A), and 0 log 0 = 0
    terms: Tensor = -torch.special.xlogy(masses, shares)
    return terms.sum(-1)

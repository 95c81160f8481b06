"""The two contracts of this room: losses of one rank's batch, and heads that give them.

A model may hand over its losses in several forms: one function per task, one function for all tasks, one
loss per sample, or losses that are already computed. `Heads` reads each form, and `LocalLosses` is what all
of them give. Probes know these two contracts and no form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from mtl_dist.losses.features import Branches
from mtl_dist.losses.gradients import FeatureGradients
from mtl_dist.stats import LocalStats

Losses = Mapping[str, Tensor | None]
Counts = Mapping[str, float | Tensor]
Head = Callable[[Any], Tensor | None]
HeadFunctions = Mapping[str, Head] | Callable[[Any], Losses]
# Raises an error on this rank where a scalar flag holds, and tells the other ranks.
Refuse = Callable[[Tensor, Callable[[], Exception]], None]


class LocalLosses(ABC):
    """The losses of one rank's batch.

    Attributes:
        counts: `[n]`, `c_i`, samples (or tokens) behind each local mean; 0 where the task is absent.
        dtype: of the total: float64 where a loss is, else float32.
    """

    counts: Tensor
    dtype: torch.dtype

    @property
    @abstractmethod
    def outputs(self) -> Sequence[Tensor]:
        """The tensors with a graph that `gradients` and `total` differentiate; empty where there is none."""

    @abstractmethod
    def means(self) -> Sequence[Tensor | None]:
        """The n local mean losses `l_i`, each with its graph: what plain autograd would differentiate.

        None (or NaN, where only the device knows) for a task that is absent on this rank.
        """

    @abstractmethod
    def gradients(self, leaves: Sequence[Tensor], scale: Tensor | None) -> FeatureGradients:
        """The gradients of every task's loss at the features. The graph is kept.

        Args:
            leaves: of the features.
            scale: scalar to differentiate the losses with (gradients in float16 need the loss scale, or they
                vanish); None: no scale.
        """

    @abstractmethod
    def weighed(self, shares: Tensor) -> Sequence[Tensor | None]:
        """`shares_i l_i` with their graphs; None, or a constant zero, where the task is absent on this rank.

        Args:
            shares: `[n]`, taken as constants, 0 where the task is absent.
        """

    @abstractmethod
    def total(self, coefficients: Tensor) -> Tensor:
        """`Σ coefficients_i l_i` over the local mean losses; a constant where no loss has a graph.

        Args:
            coefficients: `[n]`, taken as constants.
        """

    @abstractmethod
    def stats(self, gram: Tensor | None = None) -> LocalStats:
        """These losses as statistics that add over ranks.

        Args:
            gram: `[n, n]`, `c_i c_j ⟨g_i, g_j⟩`, as `FeatureGradients.gram` gives it; None where gradients
                were not measured.
        """


class Heads(ABC):
    """From what the model hands over to the losses of its batch.

    Attributes:
        separable: whether every task's loss is a function of its own, so that each can be evaluated on its
            own view of the features (`on_views`).
        apart: whether the gradients of the tasks arrive apart in one backward: on views of their own, or in
            the rows of their own samples.
        on_losses: whether the model hands over losses instead of features.
    """

    separable: ClassVar[bool] = False
    apart: ClassVar[bool] = False
    on_losses: ClassVar[bool] = False

    @abstractmethod
    def at(self, given: Any, device: torch.device | None = None) -> LocalLosses:
        """The losses on the features, or those given in their place (`on_losses`).

        Args:
            given: features (a pytree), or losses.
            device: where the statistics are wanted; None: where the losses are.

        Raises:
            ValueError: unknown tasks, or losses, counts or task ids that cannot be.
            TypeError: a function that returns something else than losses.
        """

    def on_views(self, branches: Branches) -> LocalLosses:
        """The losses of separable heads, each on its own views of the features.

        Raises:
            ValueError: as `at`; an unknown task is found before any head runs.
        """
        raise TypeError(f"{type(self).__name__} is one function for all tasks")

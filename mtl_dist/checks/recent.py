"""Watches that look at the last few steps now and then, and warn the user once."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_dist.sync import HostCopy

_LOGGER = logging.getLogger("mtl_dist")

STREAK = 8  # steps in a row before anything is said


class Watches:
    """The watches of one balancer.

    Args:
        of_grams: take the Gram of each measured step, `[n, n]`.
        of_weights: take the weights of each step, `[n]`, 0 for absent tasks.
    """

    def __init__(self, of_grams: Sequence[Recent], of_weights: Sequence[Recent]) -> None:
        self._of_grams, self._of_weights = of_grams, of_weights

    def look(self, gram: Tensor | None, weights: Tensor, rank: int) -> None:
        """Takes in one step; None: without a measurement."""
        for watch in self._of_weights:
            watch.look(weights, rank)
        if gram is not None:
            for watch in self._of_grams:
                watch.look(gram, rank)


class Recent(ABC):
    """Keeps one small tensor of each of the last 8 steps.

    At the 8th, 16th, 32nd, ... step they are copied to the host, which reads them at the next step. So a step
    costs nothing on the device, and never waits for it.

    Attributes:
        rule: for the message.
        probe: for the message.
    """

    def __init__(self, rule: object, probe: object) -> None:
        self.rule, self.probe = rule, probe
        self._steps = 0
        self._said = False
        self._recent: deque[Tensor] = deque(maxlen=STREAK)
        self._copy: HostCopy | None = None

    def __getstate__(self) -> dict[str, object]:
        """Without a copy that is on its way."""
        return {**self.__dict__, "_copy": None}

    def look(self, sample: Tensor, rank: int) -> None:
        """Takes in one step. Rank 0 warns the user once."""
        if self._said:
            return
        if self._copy is not None and not self._copy.is_here:
            self._read(self._copy, rank)
        self._steps += 1
        self._recent.append(sample)
        if self._steps >= STREAK and self._steps & (self._steps - 1) == 0:
            copy = HostCopy(torch.stack(list(self._recent)))
            if copy.is_here:
                self._read(copy, rank)
            else:
                self._copy = copy

    def _read(self, copy: HostCopy, rank: int) -> None:
        self._copy = None
        if self.holds(list(copy.tensor())):
            self._said = True
            self._recent.clear()
            if rank == 0:
                _LOGGER.warning(self.text())

    @abstractmethod
    def holds(self, recent: list[Tensor]) -> bool:
        """Whether there is something to say about the last steps."""

    @abstractmethod
    def text(self) -> str:
        """The warning."""

"""The report of a step whose statistics are on their way."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

from torch import Tensor

from mtl_dist.stats import Elapsed, StepReport, TaskStats


class ArrivingReport(StepReport):
    """A report that waits where its values are read, and nowhere else.

    Args:
        tasks: names of the n tasks.
        step: number of updates of the rule before it.
        arrive: waits for all statistics that are on their way.

    Attributes:
        arrived: the report itself, once it is there.
    """

    arrived: StepReport | None

    def __init__(self, tasks: tuple[str, ...], step: int, arrive: Callable[[], None]) -> None:
        self.__dict__.update(tasks=tasks, _step=step, _arrive=arrive, arrived=None)

    def __setattr__(self, name: str, value: Any) -> None:
        """Reports are frozen, but this one has still to arrive."""
        if name != "arrived":
            super().__setattr__(name, value)
        self.__dict__[name] = value

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies hold values."""
        return StepReport, (self.tasks, self.stats, self.weight_vector, self.held, self.sync)

    @property
    def step(self) -> int:
        """Known before the values."""
        return int(self.__dict__["_step"])

    @cached_property
    def stats(self) -> TaskStats:
        """See `StepReport`."""
        return self._values().stats

    @cached_property
    def weight_vector(self) -> Tensor:
        """See `StepReport`."""
        return self._values().weight_vector

    @cached_property
    def held(self) -> Tensor:
        """See `StepReport`."""
        return self._values().held

    @cached_property
    def sync(self) -> Elapsed:
        """See `StepReport`."""
        return self._values().sync

    def _values(self) -> StepReport:
        if self.__dict__["arrived"] is None:
            self.__dict__["_arrive"]()
        found = self.__dict__["arrived"]
        if found is None:
            raise RuntimeError(
                f"mtl_dist: the statistics of step {self.step} did not arrive: their step failed, or a state "
                "was loaded before they were read"
            )
        assert isinstance(found, StepReport)
        return found

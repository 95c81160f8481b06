"""The interface of a tracker: it is started, receives rows, and is closed. Each tracker has its own file."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from mtl_dist.tracking.rows import Row


@dataclass(frozen=True)
class RunInfo:
    """What a tracker gets to know about a run.

    Attributes:
        folder: the run's output folder. Its last part is the default name of the run.
        tasks: task names, in the order of every vector.
        config: the configuration of the run, as JSON values.
        done: number of optimizer steps already done, before the run was resumed.
        resume: tracker -> its `Tracker.run_id` before the run was resumed. Empty for a new run.
    """

    folder: Path
    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    done: int = 0
    resume: Mapping[str, str] = field(default_factory=dict)


class Tracker(ABC):
    """Receives the rows of one run. It exists on the main process only.

    Attributes:
        name: its name in configurations.
        run_id: the tracker's own name of the run, once started. A resumed run gets it in `RunInfo.resume`.
        where: how to look at the run, once closed; None if the tracker offers no view.
    """

    name: ClassVar[str]
    run_id: str | None = None
    where: str | None = None

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Opens the run. If it raises an error, the tracker is dropped and the training continues."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Receives the row of one optimizer step. `train/global_step` increases from call to call."""

    @abstractmethod
    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the run.

        Args:
            summary: summary of a finished run, as in `summary.json`; None if the run failed.
        """


def require(package: str, tracker: str, extra: str) -> None:
    """Raises an error if the package of a tracker is not installed.

    Raises:
        ValueError: the package is missing; the message says what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{tracker!r} needs the package {package}, which is missing: pip install 'mtl-dist[{extra}]'"
        )

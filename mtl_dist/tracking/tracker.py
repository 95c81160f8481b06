"""What a tracker is: it is started, takes rows, is closed. One file a tracker, chosen by name."""

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
    """What a tracker may know of a run.

    Attributes:
        folder: the run's output folder; its last part is the run's name unless another is given.
        tasks: names, in the order of every vector.
        config: everything the run was made from, as JSON would have it.
        done: optimizer steps already done, by an earlier segment of the same run.
        resume: by tracker, how the earlier segment calls the run (`Tracker.run_id`); empty for a new run.
    """

    folder: Path
    tasks: tuple[str, ...]
    config: Mapping[str, Any]
    done: int = 0
    resume: Mapping[str, str] = field(default_factory=dict)


class Tracker(ABC):
    """Takes the rows of one run. Lives on the main process alone.

    Attributes:
        name: in configurations.
        run_id: how the run is called there, once started; what a resumed run hands back in `RunInfo.resume`.
        where: how to look at the run, once closed; None where there is nothing to say.
    """

    name: ClassVar[str]
    run_id: str | None = None
    where: str | None = None

    @abstractmethod
    def start(self, run: RunInfo) -> None:
        """Opens the run. Whatever it raises costs this tracker, never the training."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Takes the row of one optimizer step; `train/global_step` grows from call to call."""

    @abstractmethod
    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Ends the run.

        Args:
            summary: of a finished run, as in `summary.json`; None where the run failed.
        """


def require(package: str, tracker: str, extra: str) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        ValueError: with what to install.
    """
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"{tracker!r} needs the package {package}, not installed: pip install 'mtl-dist[{extra}]'"
        )

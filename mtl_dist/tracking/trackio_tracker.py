"""Trackio: a local tracker with one SQLite file per project."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from mtl_dist.tracking.keys import STEP_KEY
from mtl_dist.tracking.rows import Row
from mtl_dist.tracking.tracker import RunInfo, Tracker, require


class TrackioTracker(Tracker):
    """A run of a Trackio project. `trackio show` compares the runs of a project.

    Trackio chooses the folder of its files: TRACKIO_DIR, or ~/.cache/huggingface/trackio.

    Args:
        project: Trackio project.
        name: name of the run. None: the last part of its output folder.
        group: group of runs.
    """

    name = "trackio"

    def __init__(self, project: str = "mtl-dist", name: str | None = None, group: str | None = None) -> None:
        require("trackio", self.name, "trackers")
        self.project = project
        self._name = name
        self._group = group
        self._run: Any = None

    def start(self, run: RunInfo) -> None:
        """Opens a new run, or continues an earlier one."""
        import trackio

        earlier = run.resume.get(self.name)
        with _silence():
            self._run = trackio.init(
                self.project,
                name=earlier or self._name or run.folder.name,
                group=self._group,
                config=dict(run.config),
                resume="never" if earlier is None else "allow",
                embed=False,
                auto_log_cpu=False,
                auto_log_gpu=False,
            )
        self.run_id = self._run.name

    def log(self, row: Row) -> None:
        """Queues the row for the thread of Trackio."""
        columns = {key: value for key, value in row.items() if key != STEP_KEY}
        self._run.log(columns, step=int(row[STEP_KEY]))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Waits until everything is written."""
        if self._run is not None:
            import trackio

            with _silence():
                # not `self._run.finish()`: after that, Trackio would finish the run again at exit
                trackio.finish()  # type: ignore[no-untyped-call]  # Trackio leaves it unannotated
            self.where = f"trackio show --project {self.project}"


def _silence() -> contextlib.redirect_stdout[io.StringIO]:
    """Hides the page of text that Trackio prints at every start."""
    return contextlib.redirect_stdout(io.StringIO())

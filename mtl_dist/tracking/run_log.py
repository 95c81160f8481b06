"""Turns the steps of a run into the rows of its trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from mtl_dist.stats import StepReport
from mtl_dist.tracking.files import METRICS
from mtl_dist.tracking.keys import check_task_names
from mtl_dist.tracking.rows import Row, Snapshot
from mtl_dist.tracking.tracker import RunInfo, Tracker

_LOGGER = logging.getLogger("mtl_dist")


class RunLog:
    """Makes a row of every optimizer step that is due, and gives it to all trackers.

        with RunLog(trackers, run) as log:
            for step, batch in enumerate(loader, start=1):
                loss = model(batch)                # for every micro-batch
                log.add(balancer.report)
                ...
                log.step(step, {"perf/step_ms": milliseconds})
            log.close(summary)

    On an accelerator, the row of a step is copied to the host during the next step, and the trackers get it
    after that step. On the CPU they get it at once. If a tracker fails, one log line says so, the tracker is
    dropped, and the training continues.

    Args:
        trackers: the trackers of this process; only the main process has any.
        run: passed to `Tracker.start`.
        log_every: a row is due every `log_every` steps.

    Raises:
        ValueError: a task name that no column can have, or `log_every` that is no number of steps; before
            anything is trained.

    Attributes:
        last_row: the newest row that is on the host; None before the first.
    """

    def __init__(self, trackers: Sequence[Tracker], run: RunInfo, log_every: int = 1) -> None:
        check_task_names(run.tasks)
        if isinstance(log_every, bool) or not isinstance(log_every, int) or log_every < 1:
            raise ValueError(f"RunLog: log_every must be a number of steps >= 1, got {log_every!r}")
        self.last_row: Row | None = None
        self._trackers = list(trackers)
        self._run = run
        self._log_every = log_every
        self._reports: list[StepReport] = []
        self._latest: StepReport | None = None
        self._pending: list[tuple[Snapshot, int, Row]] = []

    def __enter__(self) -> Self:
        self._each("start", lambda tracker: tracker.start(self._run))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.close(None)

    @property
    def run_ids(self) -> dict[str, str]:
        """The name of the run in each tracker, for `RunInfo.resume` when the run is resumed."""
        return {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id is not None}

    def add(self, report: StepReport | None) -> None:
        """Adds the balancer's report of a micro-batch.

        With `Balancer(window=k)` a new report exists only at the end of a window. Until then the balancer
        returns the previous report, which is not added again.
        """
        if report is not None and report is not self._latest:
            self._reports.append(report)
            self._latest = report

    def is_due(self, global_step: int) -> bool:
        """Whether `log_every` makes a row of `global_step`."""
        return global_step % self._log_every == 0

    def step(self, global_step: int, extra: Mapping[str, float] | None = None, *, due: bool = False) -> None:
        """Ends an optimizer step.

        Args:
            global_step: number of optimizer steps done, including this one.
            extra: further columns of its row.
            due: make a row even if `log_every` makes none.
        """
        reports, self._reports = self._reports, []
        if not reports and self._latest is not None:
            reports = [self._latest]  # its weights are still in use
        self.flush()
        if due or self.is_due(global_step):
            snapshot = Snapshot(reports)
            self._pending.append((snapshot, global_step, dict(extra or {})))
            if snapshot.ready:
                self.flush()

    def flush(self) -> None:
        """Waits for the row that is still being copied, and gives it to the trackers."""
        pending, self._pending = self._pending, []
        for snapshot, global_step, extra in pending:
            self.last_row = {**snapshot.row(global_step), **extra}
            self._each("log", partial(_log, self.last_row))

    def close(self, summary: Mapping[str, Any] | None) -> list[str]:
        """Gives the last row to the trackers and ends the run. Call it once.

        Args:
            summary: summary of a finished run; None if the run failed.

        Returns:
            how to look at the run: one line per tracker that offers a view.
        """
        if summary is None:
            self._pending.clear()  # reading it could wait forever for a broken device
        self.flush()
        self._each("close", lambda tracker: tracker.close(summary))
        trackers, self._trackers = self._trackers, []
        return [tracker.where for tracker in trackers if tracker.where is not None]

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                if tracker.name == "jsonl":  # every run must have this record
                    raise
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                _LOGGER.warning(
                    "mtl_dist: %s failed in %s and is dropped: %s. Training continues; every row is in %s",
                    tracker.name,
                    what,
                    reason,
                    METRICS,
                )


def _log(row: Row, tracker: Tracker) -> None:
    tracker.log(row)

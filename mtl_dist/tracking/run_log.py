"""From the steps of a run to the rows of its trackers."""

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
    """Makes a row of every optimizer step that is due and hands it to all trackers.

        with RunLog(trackers, run) as log:
            for step, batch in enumerate(loader, start=1):
                loss = model(batch)                # of every micro-batch
                log.add(balancer.report)
                ...
                log.step(step, {"perf/step_ms": milliseconds})
            log.close(summary)

    On an accelerator the row of a step is copied beside the next step and handed on after it; on the CPU at
    once. A tracker that fails is told about once and dropped, and training goes on.

    Args:
        trackers: of this process; none on other ranks than the main one.
        run: what they are started with.
        log_every: steps from row to row.

    Raises:
        ValueError: a task name that no column can have; before anything is trained.

    Attributes:
        last_row: the newest row that has arrived; None before the first.
    """

    def __init__(self, trackers: Sequence[Tracker], run: RunInfo, log_every: int = 1) -> None:
        check_task_names(run.tasks)
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
        """How the trackers call the run, for `RunInfo.resume` of a later segment."""
        return {tracker.name: tracker.run_id for tracker in self._trackers if tracker.run_id is not None}

    def add(self, report: StepReport | None) -> None:
        """Takes what the balancer reports of a micro-batch.

        A balancer whose weights hold over a window of micro-batches reports the window when it closes; until
        then it shows the report before, which is not taken again.
        """
        if report is not None and report is not self._latest:
            self._reports.append(report)
            self._latest = report

    def is_due(self, global_step: int) -> bool:
        """Whether `global_step` has a row even if nothing else is known of it."""
        return global_step % self._log_every == 0

    def step(self, global_step: int, extra: Mapping[str, float] | None = None, *, due: bool = False) -> None:
        """Ends an optimizer step.

        Args:
            global_step: optimizer steps done, this one included.
            extra: further columns of its row.
            due: make a row whatever `log_every` says.
        """
        reports, self._reports = self._reports, []
        if not reports and self._latest is not None:
            reports = [self._latest]  # its weights still hold
        self.flush()
        if due or self.is_due(global_step):
            snapshot = Snapshot(reports)
            self._pending.append((snapshot, global_step, dict(extra or {})))
            if snapshot.ready:
                self.flush()

    def flush(self) -> None:
        """Hands on the row that is still on its way."""
        pending, self._pending = self._pending, []
        for snapshot, global_step, extra in pending:
            self.last_row = {**snapshot.row(global_step), **extra}
            self._each("log", partial(_log, self.last_row))

    def close(self, summary: Mapping[str, Any] | None) -> list[str]:
        """Hands on what is left and ends the run; once.

        Args:
            summary: of a finished run; None where it failed.

        Returns:
            how to look at the run, a line for each tracker that has something to say.
        """
        if summary is None:
            self._pending.clear()  # reading it could wait for a device that will not come back
        self.flush()
        self._each("close", lambda tracker: tracker.close(summary))
        trackers, self._trackers = self._trackers, []
        return [tracker.where for tracker in trackers if tracker.where is not None]

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                if tracker.name == "jsonl":  # the record that a run can always rely on
                    raise
                self._trackers.remove(tracker)
                reason = " ".join(str(error).split()) or type(error).__name__
                _LOGGER.warning(
                    "mtl_dist: %s dropped at %s: %s. Training goes on; every row is in %s",
                    tracker.name,
                    what,
                    reason,
                    METRICS,
                )


def _log(row: Row, tracker: Tracker) -> None:
    tracker.log(row)

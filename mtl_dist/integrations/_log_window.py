"""Mean rows between two logging steps of a framework that logs by itself."""

from __future__ import annotations

from mtl_dist.balancer import Balancer
from mtl_dist.stats import StepReport
from mtl_dist.tracking import STEP_KEY, Row, Snapshot

_PENDING = 128  # optimizer steps whose reports wait on the device before they are summed on the host


class LogWindow:
    """Gathers a balancer's reports, and gives the mean of its rows since the last one.

    Args:
        balancer: whose reports.
        prefix: put into each key behind its first part: `mtl/<prefix>weight/<task>`.
    """

    def __init__(self, balancer: Balancer, prefix: str) -> None:
        self._balancer = balancer
        self._prefix = prefix
        self.clear()

    def clear(self) -> None:
        """Forgets everything, and takes the balancer's report of now for an old one."""
        self._last: StepReport | None = self._balancer.report
        self._micro_batches: list[StepReport] = []
        self._pending: list[list[StepReport]] = []
        self._sums: Row = {}
        self._counts: Row = {}
        self._steps = 0

    def add_micro_batch(self) -> None:
        """Takes the balancer's report, if it is a new one."""
        report = self._balancer.report
        if report is not None and report is not self._last:
            self._micro_batches.append(report)
            self._last = report

    def close_step(self) -> None:
        """An optimizer step is done."""
        if self._micro_batches:
            self._pending.append(self._micro_batches)
            self._micro_batches = []
        if len(self._pending) >= _PENDING:
            self._sum()

    def row(self) -> Row:
        """The mean row; each key over the steps that have it, `mtl/held` over all. Starts anew."""
        self._sum()
        counts = {**self._counts, "mtl/held": self._steps}
        means = {self._named(key): value / counts[key] for key, value in self._sums.items()}
        self._sums, self._counts, self._steps = {}, {}, 0
        return means

    def _sum(self) -> None:
        snapshots = [Snapshot(reports) for reports in self._pending]  # all copies are on their way
        self._pending = []
        for snapshot in snapshots:
            row = snapshot.row(0)
            del row[STEP_KEY], row["train/loss"]  # the framework has its own
            self._steps += 1
            for key, value in row.items():
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._counts[key] = self._counts.get(key, 0) + 1

    def _named(self, key: str) -> str:
        room, _, rest = key.partition("/")
        return f"{room}/{self._prefix}{rest}"

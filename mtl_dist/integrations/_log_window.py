"""Mean rows between two logging steps, for frameworks that do their own logging."""

from __future__ import annotations

from weakref import ref

from mtl_dist.balancer import Balancer
from mtl_dist.stats import StepReport
from mtl_dist.tracking import STEP_KEY, Row, Snapshot

_PENDING = 128  # number of steps whose reports stay on the device before they are summed on the host


class LogWindow:
    """Collects the reports of a balancer, and returns the mean of the rows since the last call.

    Args:
        balancer: the balancer with the reports.
        prefix: inserted into each key after its first part: `mtl/<prefix>weight/<task>`.
    """

    def __init__(self, balancer: Balancer, prefix: str) -> None:
        self._balancer = ref(balancer)  # a logger must not keep a model alive
        self._prefix = prefix
        self.clear()

    def clear(self) -> None:
        """Removes all collected reports. The current report of the balancer counts as old."""
        self._last: StepReport | None = self._report()
        self._micro_batches: list[StepReport] = []
        self._pending: list[list[StepReport]] = []
        self._sums: Row = {}
        self._counts: Row = {}
        self._steps = 0

    def add_micro_batch(self) -> None:
        """Adds the balancer's report, if it is new."""
        report = self._report()
        if report is not None and report is not self._last:
            self._micro_batches.append(report)
            self._last = report

    def close_step(self) -> None:
        """Ends an optimizer step."""
        if self._micro_batches:
            self._pending.append(self._micro_batches)
            self._micro_batches = []
        if len(self._pending) >= _PENDING:
            self._sum()

    def row(self) -> Row:
        """The mean row: each key over the steps that have it, `mtl/held` over all. Starts a new mean."""
        self._sum()
        counts = {**self._counts, "mtl/held": self._steps}
        means = {self._named(key): value / counts[key] for key, value in self._sums.items()}
        self._sums, self._counts, self._steps = {}, {}, 0
        return means

    def _report(self) -> StepReport | None:
        balancer = self._balancer()
        return None if balancer is None else balancer.report

    def _sum(self) -> None:
        snapshots = [Snapshot(reports) for reports in self._pending]  # starts all copies
        self._pending = []
        for snapshot in snapshots:
            row = snapshot.row(0)
            del row[STEP_KEY], row["train/loss"]  # the framework logs its own
            self._steps += 1
            for key, value in row.items():
                self._sums[key] = self._sums.get(key, 0.0) + value
                self._counts[key] = self._counts.get(key, 0) + 1

    def _named(self, key: str) -> str:
        room, _, rest = key.partition("/")
        return f"{room}/{self._prefix}{rest}"

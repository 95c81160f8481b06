"""A word of one rank to all, which travels with the statistics of a step and costs no collective."""

from __future__ import annotations

from mtl_dist.sync.summed import Summed


class Notice:
    """A flag that any rank may raise. All ranks see it after the same step.

    Where it arrives later (from an accelerator, and with lag=1), it is seen one step later, so the host never
    waits inside a step.

    Attributes:
        raised: whether this rank raises it. A signal handler may set it.
        listening: whether this rank wants to hear; otherwise nothing is read.
        heard: whether a rank had raised it, as far as this rank's host knows. The same on every rank.
    """

    def __init__(self) -> None:
        self.raised = False
        self.listening = False
        self.heard = False
        self._pending: list[Summed] = []

    def hear(self, summed: Summed, *, late: bool = False) -> None:
        """Takes in what the ranks sent.

        Args:
            summed: their sum.
            late: whether ranks may take it in at different moments, so that it counts from the next step on.
        """
        if not self.listening:
            return
        if late or not summed.copy.is_here:
            self._pending.append(summed)
        else:
            self.heard = self.heard or summed.faults.notice

    def settle(self) -> None:
        """Reads what came in earlier steps; the next step begins."""
        pending, self._pending = self._pending, []
        for summed in pending:
            self.heard = self.heard or summed.faults.notice

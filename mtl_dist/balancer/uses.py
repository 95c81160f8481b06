"""Whether a balancer is used: calls in training, and backwards that pass through their totals."""

from __future__ import annotations

from torch import Tensor


class Uses:
    """Counts how a balancer is used. Integrations ask it whether a training passes the balancer at all.

    Attributes:
        calls: number of calls in training mode that returned a total.
        backwards: number of those totals that a backward has reached.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.backwards = 0

    def note_backward(self, _: Tensor) -> None:
        """Notes that a backward reached a total; the total's hook."""
        self.backwards += 1

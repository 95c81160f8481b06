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

    def follow(self, total: Tensor) -> None:
        """Notes a call, and later the backward of its total."""
        self.calls += 1
        if total.requires_grad:
            total.register_hook(self._note)  # type: ignore[no-untyped-call]

    def _note(self, _: Tensor) -> None:
        self.backwards += 1

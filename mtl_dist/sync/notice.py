"""A word of one rank to all, which travels with the statistics of a step and costs no collective."""

from __future__ import annotations

import torch
from torch import Tensor


class Notice:
    """A flag that any rank may raise. All ranks see it after the same step.

    On an accelerator it is copied to the host in the background and seen one step later, so the host never
    waits inside a step.

    Attributes:
        raised: whether this rank raises it. A signal handler may set it.
        listening: whether this rank wants to hear; otherwise `hear` and `settle` are not called.
        heard: whether a rank had raised it, as far as this rank's host knows. The same on every rank.
    """

    def __init__(self) -> None:
        self.raised = False
        self.listening = False
        self.heard = False
        self._pending: list[tuple[Tensor, torch.Event]] = []

    def hear(self, total: Tensor) -> None:
        """Takes the sum over ranks of what they sent, `[1]`."""
        if total.device.type == "cpu":
            self.heard = self.heard or bool(total > 0)
            return
        host = torch.empty(total.shape, dtype=total.dtype, pin_memory=True)
        host.copy_(total, non_blocking=True)
        event = torch.Event(total.device)
        event.record()
        self._pending.append((host, event))

    def settle(self) -> None:
        """Reads what came in earlier steps; the next step begins."""
        pending, self._pending = self._pending, []
        for host, event in pending:
            event.synchronize()
            self.heard = self.heard or bool(host > 0)

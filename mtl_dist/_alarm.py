"""Raising on what a device flag says, without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Alarm:
    """Looks at flags: at once on the CPU, one step later on an accelerator.

    An accelerator's flag is copied to the host in the background and read at the next `poll`, a whole step
    later, so that the host never waits in the step. All ranks read the same flag at the same step.
    """

    def __init__(self) -> None:
        self._pending: list[tuple[Tensor, torch.Event, Callable[[], Exception]]] = []

    def watch(self, flag: Tensor, explain: Callable[[], Exception]) -> None:
        """Raises `explain()` where `flag` (scalar bool) holds, now or at the next `poll`."""
        if flag.device.type == "cpu":
            if flag:
                raise explain()
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(flag.device)
        event.record()
        self._pending.append((host, event, explain))

    def poll(self) -> None:
        """Raises for the first flag that was set since the last `poll`."""
        pending, self._pending = self._pending, []
        for flag, event, explain in pending:
            event.synchronize()
            if flag:
                raise explain()

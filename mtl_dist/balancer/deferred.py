"""Errors that a flag on the device decides, raised without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class DeferredErrors:
    """Looks at flags: at once on the CPU, one step later on an accelerator.

    The flag of an accelerator is copied to the host in the background and read at the next `poll`, one whole
    step later, so the host never waits inside a step. All ranks read the same flag at the same step.

    Attributes:
        pending: flags that were not read yet, each with the event of its copy and its error.
    """

    def __init__(self) -> None:
        self.pending: list[tuple[Tensor, torch.Event, Callable[[], Exception | None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without flags that are on their way: they belong to this process, and to this step."""
        return {"pending": []}

    def watch(self, flag: Tensor, explain: Callable[[], Exception | None]) -> None:
        """Raises `explain()` where `flag` (scalar bool) holds, now or at the next `poll`. None: no error."""
        if flag.device.type == "cpu":
            if flag and (error := explain()) is not None:
                raise error
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(flag, non_blocking=True)
        event = torch.Event(flag.device)
        event.record()
        self.pending.append((host, event, explain))

    def poll(self) -> None:
        """Raises the error of the first flag that was set since the last `poll`."""
        pending, self.pending = self.pending, []
        for flag, event, explain in pending:
            event.synchronize()
            if flag and (error := explain()) is not None:
                raise error

"""Errors that values of the device decide, raised without making the host wait for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from mtl_dist.stats import HOST
from mtl_dist.sync import HostCopy

Judge = Callable[[], Exception | None]


class DeferredErrors:
    """Looks at values: at once on the CPU, one step later on an accelerator.

    Values of an accelerator are copied to the host in the background and read at the next `poll`, one whole
    step later, so the host never waits inside a step. All ranks read the same values at the same step.

    Attributes:
        pending: judges whose values were not read yet.
    """

    def __init__(self) -> None:
        self.pending: list[Judge] = []

    def __getstate__(self) -> dict[str, Any]:
        """Without values that are on their way: they belong to this process, and to this step."""
        return {"pending": []}

    def judge(self, copy: HostCopy, judge: Judge) -> None:
        """Raises the error that `judge` finds in values that are copied; None: it finds none."""
        if not copy.is_here:
            self.pending.append(judge)
        elif (error := judge()) is not None:
            raise error

    def watch(self, flag: Tensor, explain: Judge) -> None:
        """Raises `explain()` where `flag` (scalar bool) holds, now or at the next `poll`. None: no error."""
        if flag.device.type != HOST:
            self.pending.append(partial(_where, HostCopy(flag), explain))
        elif flag and (error := explain()) is not None:
            raise error

    def poll(self) -> None:
        """Raises the first error in what was copied since the last `poll`."""
        pending, self.pending = self.pending, []
        for judge in pending:
            if (error := judge()) is not None:
                raise error


def _where(flag: HostCopy, explain: Judge) -> Exception | None:
    return explain() if flag.values() else None

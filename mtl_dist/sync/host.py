"""Values of a device, read on the host without making it wait inside a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mtl_dist.stats import on_host


class HostCopy:
    """A tensor on its way to the host. From an accelerator it is copied in the background.

    Args:
        tensor: to be read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.is_here = on_host(tensor)
        self._event: torch.Event | None = None
        self._host = tensor
        if not self.is_here:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensor."""
        return self._host.dtype

    def tensor(self) -> Tensor:
        """The tensor on the host. Where it comes from an accelerator, the host waits for the copy."""
        if self._event is not None:
            self._event.synchronize()
        return self._host

    def values(self) -> Any:
        """Its values; waits as `tensor` does."""
        return self.tensor().tolist()


_ASIDE: dict[torch.device, torch.Stream] = {}


@contextmanager
def aside(tensor: Tensor) -> Iterator[None]:
    """Inside, what is done with `tensor` on an accelerator runs beside the current stream, and after it.

    So the device waits for other ranks in a stream of its own, and the training goes on.
    """
    device = tensor.device
    if on_host(tensor):
        yield
        return
    if device not in _ASIDE:
        _ASIDE[device] = torch.Stream(device)
    stream = _ASIDE[device]
    stream.wait_stream(torch.accelerator.current_stream(device))
    tensor.record_stream(stream)  # its memory stays until the stream has passed here
    with stream:
        yield

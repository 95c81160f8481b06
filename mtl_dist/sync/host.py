"""Values of a device, read on the host without making it wait inside a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class HostCopy:
    """A tensor on its way to the host. From an accelerator it is copied in the background.

    Args:
        tensor: to be read.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.is_here = tensor.device.type == "cpu"
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

    def values(self) -> Any:
        """Its values. Where it comes from an accelerator, the host waits until the copy has arrived."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()

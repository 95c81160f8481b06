"""Run a block, then undo its side effects on random state and module buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def replayed(devices: Iterable[torch.device]) -> Iterator[None]:
    """After the block, generators and the buffers of every module that it called are as they were before.

    Args:
        devices: where random numbers may be drawn, in addition to the CPU.
    """
    saved: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def remember(module: nn.Module, _: Any) -> None:
        for name, buffer in module.named_buffers(recurse=False):
            saved.setdefault((module, name), (buffer, buffer.clone()))

    handle = register_module_forward_pre_hook(remember)
    try:
        with _forked_generators(devices):
            yield
    finally:
        handle.remove()
        with torch.no_grad():
            for (module, name), (buffer, before) in saved.items():
                module._buffers[name] = buffer  # a module may have replaced the tensor
                buffer.data.copy_(before)  # the data: a graph made inside may have saved the buffer


@contextmanager
def _forked_generators(devices: Iterable[torch.device]) -> Iterator[None]:
    accelerators = {device for device in devices if device.type != "cpu"}
    kind = next((device.type for device in accelerators), "cuda")
    indices = sorted({device.index or 0 for device in accelerators})
    with torch.random.fork_rng(indices, device_type=kind):
        yield

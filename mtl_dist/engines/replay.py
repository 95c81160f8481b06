"""Run a block, then undo its side effects on random state and module buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

SavedBuffers = dict[tuple[nn.Module, str], tuple[Tensor, Tensor]]  # the buffer itself, and a copy


@contextmanager
def replayed(devices: Iterable[torch.device]) -> Iterator[None]:
    """After the block, generators and the buffers of every module that it called are as they were before.

    Args:
        devices: where random numbers may be drawn, in addition to the CPU.
    """
    with _forked_generators(devices), buffers_kept():
        yield


@contextmanager
def buffers_kept() -> Iterator[None]:
    """After the block, the buffers of every module that ran in it are as they were before.

    Gradients run modules too: those in a checkpoint, whose forward is computed again.
    """
    saved: SavedBuffers = {}
    handle = register_module_forward_pre_hook(partial(remember_buffers, saved))
    try:
        yield
    finally:
        handle.remove()
        restore_buffers(saved)


def remember_buffers(saved: SavedBuffers, module: nn.Module, _: Any) -> None:
    """Hook before the forward of a module: copies its buffers, once."""
    for name, buffer in module.named_buffers(recurse=False):
        saved.setdefault((module, name), (buffer, buffer.clone()))


@torch.no_grad()
def restore_buffers(saved: SavedBuffers) -> None:
    """Brings all of them back."""
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

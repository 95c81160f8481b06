"""Adds balancers to `accelerator.save_state` and `load_state`: hooks and their own files, without pickle."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import WeakKeyDictionary

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer
from mtl_dist.integrations._attached import Attached


class Checkpointer(Protocol):
    """The part of `accelerate.Accelerator` that this module uses."""

    is_main_process: bool
    is_local_main_process: bool
    project_configuration: Any

    def register_save_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, weights, folder)` on every rank in `save_state`."""

    def register_load_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, folder)` on every rank in `load_state`."""


_ATTACHED: WeakKeyDictionary[Any, Attached] = WeakKeyDictionary()


def attached_to(accelerator: Checkpointer) -> Attached:
    """The balancers in the checkpoints of the accelerator. The first call adds its hooks.

    Every rank packs the states, so that an error of the previous step is raised on all ranks. The main
    process writes them (with `save_on_each_node`, one process per machine). Every rank reads them.
    """
    if (known := _ATTACHED.get(accelerator)) is not None:
        return known
    attached = _ATTACHED[accelerator] = Attached()

    def save(models: Any, weights: Any, folder: str) -> None:
        for name, balancer in attached.live().items():
            packed = checkpoint.pack(balancer)
            if _writes(accelerator):
                checkpoint.write(packed, folder, name)

    def load(models: Any, folder: str) -> None:
        for name, balancer in attached.live().items():
            checkpoint.load(balancer, folder, name)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
    return attached


def register(balancer: Balancer, accelerator: Checkpointer, name: str) -> None:
    """Adds `balancer` to the checkpoints of the accelerator, as `<name>.json` and its tensors.

    Raises:
        ValueError: the balancer is already attached, or another balancer has this name.
    """
    attached_to(accelerator).add(balancer, name)


def _writes(accelerator: Checkpointer) -> bool:
    on_each_node = bool(accelerator.project_configuration.save_on_each_node)
    return accelerator.is_local_main_process if on_each_node else accelerator.is_main_process

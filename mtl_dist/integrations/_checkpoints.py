"""Adds a balancer to `accelerator.save_state` and `load_state`: hooks and its own files, without pickle."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer


class Checkpointer(Protocol):
    """The part of `accelerate.Accelerator` that this module uses."""

    is_main_process: bool
    is_local_main_process: bool
    project_configuration: Any

    def register_save_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, weights, folder)` on every rank in `save_state`."""

    def register_load_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, folder)` on every rank in `load_state`."""


_ATTACHED: WeakKeyDictionary[Any, dict[str, ReferenceType[Balancer]]] = WeakKeyDictionary()


def register(balancer: Balancer, accelerator: Checkpointer, name: str) -> None:
    """Adds `balancer` to the checkpoints of the accelerator, as `<name>.json` and its tensors.

    Every rank packs the state, so that an error of the previous step is raised on all ranks. The main process
    writes it (with `save_on_each_node`, one process per machine). Every rank reads it.

    Raises:
        ValueError: the balancer is already attached, or another balancer has this name.
    """
    attached = _ATTACHED.setdefault(accelerator, {})
    if any(other() is balancer for other in attached.values()):
        raise ValueError("this balancer is already attached: call attach once")
    if name in attached:
        raise ValueError(
            f"a balancer named {name!r} is already attached, and its checkpoint would be overwritten: "
            "use attach(balancer, accelerator, name=...) with another name"
        )
    attached[checkpoint.checked_name(name)] = ref(balancer)

    def save(models: Any, weights: Any, folder: str) -> None:
        packed = checkpoint.pack(balancer)
        if _writes(accelerator):
            checkpoint.write(packed, folder, name)

    def load(models: Any, folder: str) -> None:
        checkpoint.load(balancer, folder, name)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _writes(accelerator: Checkpointer) -> bool:
    on_each_node = bool(accelerator.project_configuration.save_on_each_node)
    return accelerator.is_local_main_process if on_each_node else accelerator.is_main_process

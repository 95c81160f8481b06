"""A balancer in `accelerator.save_state` and `load_state`: files of its own through hooks, no pickle."""

from __future__ import annotations

from typing import Any, Protocol
from weakref import ReferenceType, WeakKeyDictionary, ref

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer


class Checkpointer(Protocol):
    """The part of `accelerate.Accelerator` that is used here."""

    is_main_process: bool
    is_local_main_process: bool
    project_configuration: Any

    def register_save_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, weights, folder)` on every rank in `save_state`."""

    def register_load_state_pre_hook(self, hook: Any) -> Any:
        """Calls `hook(models, folder)` on every rank in `load_state`."""


_ATTACHED: WeakKeyDictionary[Any, dict[str, ReferenceType[Balancer]]] = WeakKeyDictionary()


def register(balancer: Balancer, accelerator: Checkpointer, name: str) -> None:
    """Makes `balancer` part of the accelerator's checkpoints, as `<name>.json` and its tensors.

    Every rank takes part in packing (an error of the step before is then raised on all of them), the main
    process writes (one of each machine under `save_on_each_node`), every rank reads.

    Raises:
        ValueError: the balancer is attached already, or another one has the name.
    """
    attached = _ATTACHED.setdefault(accelerator, {})
    if any(other() is balancer for other in attached.values()):
        raise ValueError("this balancer is attached already: call attach once")
    if name in attached:
        raise ValueError(
            f"a balancer named {name!r} is attached already, and its checkpoint would be overwritten: "
            "attach(balancer, accelerator, name=...) gives this one another name"
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

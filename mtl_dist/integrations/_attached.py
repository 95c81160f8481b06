"""The balancers that are attached to one trainer, by name. It does not keep them alive."""

from __future__ import annotations

import gc
from typing import Any
from weakref import ReferenceType, ref

from mtl_dist import checkpoint
from mtl_dist.balancer import Balancer


def check_given(balancer: Any) -> None:
    """Raises `TypeError` for what is no balancer, such as the model that holds it."""
    if not isinstance(balancer, Balancer):
        raise TypeError(
            f"got {type(balancer).__name__} in the place of the balancer: give the Balancer, such as "
            "model.balancer"
        )


class Attached:
    """Names of balancers, which are held weakly: a balancer whose model is gone is not attached any more."""

    def __init__(self) -> None:
        self._refs: dict[str, ReferenceType[Balancer]] = {}

    def live(self) -> dict[str, Balancer]:
        """The balancers that still exist, in the order in which they were attached."""
        found = {name: reference() for name, reference in self._refs.items()}
        return {name: balancer for name, balancer in found.items() if balancer is not None}

    def add(self, balancer: Balancer, name: str) -> None:
        """Attaches `balancer`. It takes the place of one of this name that is gone.

        Raises:
            ValueError: the balancer is attached already, or another one that still exists has the name.
        """
        self.check(balancer, name)
        self._refs.pop(name, None)
        self._refs[name] = ref(balancer)

    def check(self, balancer: Balancer, name: str) -> None:
        """Raises what `add` raises."""
        checkpoint.checked_name(name)
        known = next((known for known, reference in self._refs.items() if reference() is balancer), None)
        if known is not None:
            raise ValueError(
                f"this balancer is already attached, as {known!r}: call attach once. To attach it anew, call "
                f"detach({known!r}, ...) before"
            )
        if name in self.live():
            gc.collect()  # the model of an earlier attempt may be garbage that waits
        if (old := self.live().get(name)) is not None:
            raise ValueError(
                f"a balancer named {name!r} is already attached, and it still exists (at step {old.step}). "
                "If it belongs to an earlier attempt (a fold, a smaller batch, a notebook cell), call "
                f"detach({name!r}, ...) before, or delete its model and call accelerator.free_memory(). "
                "If both train together, give this one another name, the same in every run: "
                "attach(..., name=...)"
            )

    def remove(self, balancer: Balancer | str) -> Balancer | None:
        """Removes a balancer, given itself or its name.

        Returns:
            It, or None if it does not exist any more.

        Raises:
            ValueError: it is not attached here.
        """
        live = self.live()
        for name, reference in list(self._refs.items()):
            if balancer == name or (isinstance(balancer, Balancer) and live.get(name) is balancer):
                del self._refs[name]
                return reference()
        given = repr(balancer) if isinstance(balancer, str) else "this balancer"
        raise ValueError(
            f"detach: {given} is not attached here; attached are {list(live)}. Give one of these names"
        )

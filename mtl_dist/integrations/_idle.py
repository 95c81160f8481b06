"""Notices a training that does not pass its balancer: never called, or called for a loss that is not used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any
from weakref import WeakKeyDictionary

from mtl_dist.balancer import Balancer

_LOGGER = logging.getLogger("mtl_dist")
_WARN_AFTER = 10  # optimizer steps, where one balancer is used and another is not


class IdleWatch:
    """Counts optimizer steps until a backward passes through the total of a balancer.

    Args:
        patience: number of optimizer steps without one, after which the training is refused.
        remedy: what to do then.
    """

    def __init__(self, patience: int, remedy: str) -> None:
        self._patience = patience
        self._remedy = remedy
        self._before: WeakKeyDictionary[Balancer, tuple[int, int]] = WeakKeyDictionary()
        self._steps = 0
        self._waiting: tuple[str, ...] | None = None  # tasks of a balancer that was not used yet

    def add(self, balancer: Balancer) -> None:
        """Watches `balancer`, from now on."""
        self._before[balancer] = (balancer.uses.calls, balancer.uses.backwards)
        self._steps = 0
        self._waiting = balancer.tasks

    def remove(self, balancer: Balancer) -> None:
        """Watches `balancer` no longer."""
        self._before.pop(balancer, None)
        if not self._before:
            self._waiting = None

    def after_step(self) -> None:
        """Called at each optimizer step.

        Raises:
            RuntimeError: the training passes none of the balancers.
        """
        if self._waiting is None:
            return
        watched = list(self._before.items())
        self._steps += 1
        unused = [balancer for balancer, (_, backwards) in watched if balancer.uses.backwards == backwards]
        if len(unused) == len(watched):
            if self._steps >= self._patience:
                raise self._error(watched)
        elif not unused or self._steps >= max(_WARN_AFTER, self._patience):
            self._before.clear()
            self._waiting = None
            for balancer in unused:
                _LOGGER.warning(
                    "mtl_dist: the balancer of the tasks %s was not used in %d optimizer steps, another was: "
                    "call it in the forward, or detach it",
                    list(balancer.tasks),
                    self._steps,
                )

    def _error(self, watched: Sequence[tuple[Balancer, tuple[int, int]]]) -> RuntimeError:
        if not watched:
            what = "does not exist any more, because no model holds it"
        elif any(balancer.uses.calls > calls for balancer, (calls, _) in watched):
            what = "was called, but no backward passed through the scalar that it returned"
        else:
            what = "was never called in training mode"
        tasks = list(self._waiting or ())
        return RuntimeError(
            f"mtl_dist: at optimizer step {self._steps} after attach, the balancer of the tasks {tasks} "
            f"{what}: this run trains another loss, without its weights. {self._remedy}. If the balancer is "
            "used only later in the run: attach(..., late=True)"
        )


def call_after(owner: Any, method: str, call: Callable[[], None]) -> None:
    """Lets each `owner.method(...)` end with `call()`."""
    inner = getattr(owner, method)

    @wraps(inner)
    def with_call(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        call()
        return result

    setattr(owner, method, with_call)

"""Notices loops that step the optimizer inside a window, where nobody told the balancer when steps follow."""

from __future__ import annotations

from typing import Any
from weakref import ReferenceType, WeakSet, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from mtl_dist.engines import accumulators


class WindowGuard:
    """Counts the calls of a balancer between the steps of the optimizer that has its model's parameters.

    One optimizer step per call (one task per batch) is fine, and so is any fixed number of calls that divides
    the window. But where the loop accumulates k calls and steps early, at the end of an epoch, the windows
    no longer begin where the optimizer steps do.
    """

    def __init__(self) -> None:
        self._leaf: ReferenceType[Tensor] | None = None
        self._window = 1
        self._calls = 0
        self._usual: int | None = None
        self._inside = False

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy belongs to another model."""
        return WindowGuard, ()

    def follow(self, total: Tensor, window: int, *, inside: bool) -> None:
        """Notes a call.

        Args:
            total: what it returned.
            window: number of calls of a window.
            inside: whether the window goes on after it.
        """
        self._window, self._inside = window, inside
        self._calls += 1
        if self._leaf is None or self._leaf() is None:
            leaf: Any = next((node for node in accumulators(total)), None)
            self._leaf = None if leaf is None else ref(leaf.variable)
            _watch(self)

    def after_step(self, optimizer: Optimizer) -> None:
        """Called after each step of any optimizer.

        Raises:
            RuntimeError: the step is inside a window.
        """
        leaf = None if self._leaf is None else self._leaf()
        if leaf is None or not self._calls:
            return
        if not any(leaf is p for group in optimizer.param_groups for p in group["params"]):
            return
        calls, self._calls = self._calls, 0
        usual = self._usual = self._usual or calls
        if self._inside and usual > 1 and (calls % usual or self._window % usual):
            raise RuntimeError(
                "mtl_dist: the optimizer stepped inside a window: "
                f"window={self._window} calls of the balancer, and this step came after {calls}, the "
                f"first one after {usual}. From here on, weights would "
                "change inside an optimizer step. A trainer that also steps at the end of an epoch tells the "
                "balancer so: attach(balancer, trainer) of mtl_dist.integrations, or in your own loop "
                "balancer.set_engine(Engine(closes_window=...))"
            )


_GUARDS: WeakSet[WindowGuard] = WeakSet()
_hook: Any = None


def _watch(guard: WindowGuard) -> None:
    global _hook
    _GUARDS.add(guard)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for guard in list(_GUARDS):
        guard.after_step(optimizer)

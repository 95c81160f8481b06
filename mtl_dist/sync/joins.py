"""Finds out whether a join context of torch is active, under which ranks make different numbers of calls.

In `with model.join():` (and Accelerate's `join_uneven_inputs`) a rank without data answers the collectives of
DistributedDataParallel, and not those of a balancer: the others would wait for it.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from torch.nn.parallel import DistributedDataParallel


class JoinWatch:
    """Looks at the DistributedDataParallel models of this process."""

    def __init__(self) -> None:
        self._models: WeakSet[Any] = WeakSet(
            model
            for model in gc.get_referrers(DistributedDataParallel)  # its instances are among them
            if isinstance(model, DistributedDataParallel)
        )
        self._over: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def check(self) -> None:
        """Raises `RuntimeError` inside a join context."""
        if any(map(self._joins, self._known())):
            raise RuntimeError(
                "mtl_dist: a balancer cannot be called inside model.join() or accelerate's "
                "join_uneven_inputs: a rank without data answers the engine's collectives only, and the "
                "others would wait for it. Give all ranks equally many batches (drop_last=True, or "
                "accelerate's even_batches=True), and leave the context out"
            )

    def _known(self) -> Iterator[Any]:
        yield from self._models
        running = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if running is not None:
            yield running

    def _joins(self, model: Any) -> bool:
        config = model._join_config
        if not config.enable or config.throw_on_early_termination or self._over.get(model) is config:
            return False
        from torch.distributed.algorithms.join import Join  # absent where torch was built without it

        # torch leaves the configuration in place after the context: it is active while its object lives
        if any(isinstance(join, Join) and model in join._joinables for join in gc.get_referrers(Join)):
            return True
        self._over[model] = config
        return False

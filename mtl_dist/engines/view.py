"""The engine around one balancer: the facts that it was told, and what it found out by looking."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mtl_dist.engines.facts import Engine
from mtl_dist.engines.fsdp2 import Units, find_units
from mtl_dist.engines.zero3 import ZERO_3
from mtl_dist.losses import LocalLosses

_LOGGER = logging.getLogger("mtl_dist")

_HALF = (
    "mtl_dist: the features are float16 and the balancer knows of no loss scale, so small gradients count as "
    "zero. Tell it the scale: attach(...) of mtl_dist.integrations, or "
    "balancer.set_engine(Engine(scaled=scaler.scale)) for torch's GradScaler"
)


class EngineView:
    """What the steps of one balancer know about its engine.

    Attributes:
        facts: what the balancer was told.
        partitioned: whether the engine frees parameters after each use (ZeRO-3); None: not known yet.
        units: what FSDP2 shards, found at the first gradient; None where there is nothing of it.
        told: what the user was told once, by any key.
    """

    def __init__(self) -> None:
        self.facts = Engine()
        self.partitioned: bool | None = None
        self.units: Units | None = None
        self.told: set[object] = set()
        self._looked_for_units = False
        self._said_half = False

    def __deepcopy__(self, memo: dict[int, Any]) -> EngineView:
        """A view of the same engine, which looks at its own model again."""
        copied = EngineView()
        copied.facts, copied.partitioned = self.facts, self.partitioned
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Without the engine, which belongs to this process."""
        return EngineView().__dict__

    def learn(self, facts: Engine) -> None:
        """Takes new facts, and forgets what it found under the old ones."""
        self.facts = facts
        self.partitioned = None
        self.units, self._looked_for_units = None, False

    def find_partitioned(self, look: Callable[[], bool], rank: int) -> bool:
        """Whether the engine frees parameters after each use, from the facts or else by looking, once.

        Args:
            look: looks at the model.
            rank: of this process; rank 0 tells the user.
        """
        if self.partitioned is None:
            self.partitioned = look() if self.facts.partitioned is None else self.facts.partitioned
            if self.partitioned and rank == 0:
                _LOGGER.warning("mtl_dist: %s; probes evaluate the heads a second time", ZERO_3)
        return self.partitioned

    def before_backward(
        self, losses: LocalLosses, leaves: Sequence[Tensor]
    ) -> AbstractContextManager[Tensor | None]:
        """For gradients before the backward: FSDP2 is told that its backward is still to come.

        Args:
            losses: what is differentiated.
            leaves: of the features, where the gradients end.

        Returns:
            A context that gives the loss scale: the scalar to multiply losses by before they are
            differentiated; None where there is no loss scale.
        """
        if not self._looked_for_units and (outputs := losses.outputs):
            self._looked_for_units, self.units = True, find_units(outputs, leaves)
        scaled = self.facts.scaled
        scale = None if scaled is None else scaled(torch.ones((), device=losses.counts.device))
        if scale is None and not self._said_half and torch.float16 in {leaf.dtype for leaf in leaves}:
            self._said_half = True
            _LOGGER.warning(_HALF)
        return nullcontext(scale) if self.units is None else self.units.undisturbed(scale)

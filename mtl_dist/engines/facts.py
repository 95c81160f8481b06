"""What a balancer must know of the engine around it: facts that it is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Engine:
    """Facts about the engine. Integrations give them to `Balancer.set_engine`; each step asks for them.

    The defaults describe plain torch without gradient accumulation and without loss scaling.

    Attributes:
        partitioned: whether parameters are freed after each use (ZeRO-3), so that heads must be evaluated
            again. None: found out at the first step.
        accumulation: micro-batches of an optimizer step. None: not known.
        closes_window: whether an optimizer step follows the micro-batch whose forward is running. None: one
            follows every call, or every `window`-th call where the balancer holds its weights for a window.
        skipped: whether the last optimizer step was skipped, because its gradients overflowed. None: never.
        counts: `[n]`, the count of each task over all ranks and all micro-batches of the running optimizer
            step, divided by the number of micro-batches. Known where a trainer reads all micro-batches before
            the first forward. Losses are then means over the whole optimizer step, also where micro-batches
            have different counts. None: means over each micro-batch.
        scaled: multiplies a scalar by the loss scale, without waiting for the device. None: no loss scale.
    """

    partitioned: bool | None = None
    accumulation: int | None = None
    closes_window: Callable[[], bool] | None = None
    skipped: Callable[[], bool] | None = None
    counts: Callable[[], Tensor] | None = None
    scaled: Callable[[Tensor], Tensor] | None = None

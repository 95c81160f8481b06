"""DeepSpeed's insides: the facts about a `DeepSpeedEngine`, read without importing DeepSpeed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtl_dist.engines.facts import Engine

_LOGGER = logging.getLogger("mtl_dist")


def deepspeed_facts(engine: Any) -> Engine:
    """What a balancer must know about the engine: ZeRO stage, accumulation, skipped steps, loss scale.

    Raises:
        ValueError: DeepSpeed runs torch_autocast in float16, for which it does not report skipped steps.
    """
    if _has_gradient_scaler(engine):
        raise ValueError(
            "DeepSpeed's torch_autocast in float16 does not report the steps that its gradient scaler skips: "
            'use "dtype": "bfloat16" there, or the "fp16" section instead of "torch_autocast"'
        )
    return Engine(
        accumulation=engine.gradient_accumulation_steps(),
        partitioned=engine.zero_optimization_partition_weights(),
        closes_window=engine.is_gradient_accumulation_boundary if _manages_accumulation(engine) else None,
        skipped=_skip_detector(engine),
        scaled=deepspeed_loss_scaler(lambda: engine.optimizer) if engine.fp16_enabled() else None,
    )


def deepspeed_loss_scaler(optimizer: Callable[[], Any]) -> Callable[[Tensor], Tensor]:
    """Multiplies a scalar by the loss scale, which DeepSpeed keeps on the host, in its optimizer.

    Args:
        optimizer: gives DeepSpeed's optimizer, which may be made later, or made anew.
    """
    return lambda value: value * float(optimizer().loss_scale)


def _manages_accumulation(engine: Any) -> bool:
    """Whether the engine knows the last micro-batch of a step before `step()`.

    Newer engines can leave the accumulation to the caller; those of DeepSpeed 0.18 cannot.
    """
    ask = getattr(engine, "managed_gradient_accumulation", None)
    return ask is None or bool(ask())


def _skip_detector(engine: Any) -> Callable[[], bool]:
    """A function that says whether the last step was skipped, from `overflow` of DeepSpeed's optimizer."""
    told = False

    def skipped() -> bool:
        nonlocal told
        overflow = getattr(engine.optimizer, "overflow", None)
        if overflow is None and engine.fp16_enabled() and not told:
            told = True
            _LOGGER.warning(
                "mtl_dist: DeepSpeed's %s does not report the steps that it skips because of an overflow. "
                "The rule therefore learns from skipped steps too",
                type(engine.optimizer).__name__,
            )
        return bool(overflow)

    return skipped


def _has_gradient_scaler(engine: Any) -> bool:
    scalers = (
        getattr(engine, "torch_autocast_z0_gradscaler", None),
        getattr(engine.optimizer, "torch_autocast_gradscaler", None),
    )
    return any(scaler is not None for scaler in scalers)

"""Sequences that an engine splits over ranks."""

from __future__ import annotations

from typing import Any


def split_sequences(accelerator: Any, name: str) -> int:
    """Over how many ranks sequences are split, by Accelerate ("cp_size") or DeepSpeed ("sp_size")."""
    sizes = getattr(accelerator, "parallelism_config", None)  # both are younger than the oldest Accelerate
    size: int = getattr(sizes, name, 1)
    return size


def sums_gradients(size: int) -> ValueError:
    """The error for sequences that DeepSpeed splits over `size` ranks."""
    return ValueError(
        f"sequence parallelism (size {size}): the engine sums gradients over those ranks instead of "
        "averaging them, so the weighted total would be too large by that factor; use data or tensor "
        "parallelism"
    )

"""Randomness that every rank shares, and that a resumed run repeats."""

from __future__ import annotations

import torch

_STRIDE = 0x9E3779B97F4A7C15  # odd, so that (seed, step) pairs fall far apart


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator on the CPU that depends on `seed` and `step` only, never on what was drawn before."""
    return torch.Generator().manual_seed((seed * _STRIDE + step) % 2**63)

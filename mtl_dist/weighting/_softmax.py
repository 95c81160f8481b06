"""Softmax over the tasks present."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def softmax_present(logits: Tensor, present: Tensor) -> Tensor:
    """`[n]`, `exp(xᵢ) / Σⱼ exp(xⱼ)` over the tasks present, 0 for the others (and for all where nobody is).

    Args:
        logits: `[n]`, finite where present.
        present: `[n]` bool.
    """
    masked = logits.masked_fill(~present, -math.inf)
    top = torch.where(present.any(), masked.amax(), torch.zeros_like(masked[0]))
    # the largest term is 1, so that neither a sum of large logits nor an empty one divides badly
    terms = torch.exp(masked - top)
    return terms / terms.sum().clamp(min=1)

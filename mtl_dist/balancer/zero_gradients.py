"""Makes all gradients of one step exactly zero, also where its graph holds NaN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from mtl_dist.engines import accumulators


class ZeroGradients:
    """Zeroes the gradient that reaches each parameter and each feature in the next backward.

    Multiplying a loss by 0 is not enough: 0 times an infinite derivative is NaN. The backward still visits
    every parameter, so engines that count them (DDP, ZeRO) see a complete step.
    """

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def __call__(self, total: Tensor, features: Any) -> Tensor:
        """A zero with the graph of `total`, all of whose gradients will be zero."""
        for node in accumulators(total):
            self._handles.append(node.register_prehook(_zeros))
        for leaf in pytree.tree_leaves(features):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                self._handles.append(leaf.register_hook(torch.zeros_like))  # type: ignore[no-untyped-call]
        return torch.where(torch.zeros_like(total, dtype=torch.bool), total, torch.zeros_like(total))

    def release(self) -> None:
        """Takes the hooks off, before the next step's graph."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _zeros(gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if g is None else torch.zeros_like(g) for g in gradients)

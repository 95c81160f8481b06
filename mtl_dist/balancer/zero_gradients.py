"""Makes one call contribute exactly zero to every gradient, also where its graph holds NaN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtl_dist.engines import nodes

_HIDDEN = (
    "CheckpointFunctionBackward"  # reentrant activation checkpointing: its inside is no part of the graph
)


def zeroed(total: Tensor) -> Tensor:
    """A zero with the graph of `total`. Its backward gives zeros to all parameters and features.

    Multiplying a loss by 0 is not enough, because 0 times an infinite derivative is NaN. So every node of
    this graph replaces what is not finite by zero. The hooks belong to the nodes: they end with this graph,
    and they do not touch what other losses of the same step add. The backward still visits every parameter,
    so engines that count them (DDP, ZeRO) see a complete step.

    Raises:
        ValueError: a part of the graph is hidden, so its gradients cannot be zeroed.
    """
    for node in nodes(total):
        if node.name() == _HIDDEN:
            raise ValueError(
                'on_nonfinite="skip" cannot zero the gradients inside torch.utils.checkpoint(..., '
                "use_reentrant=True), which are not part of the graph: give use_reentrant=False, or "
                'on_nonfinite="raise"'
            )
        if not hasattr(node, "variable"):
            node.register_hook(_finite)
    return torch.where(torch.zeros_like(total, dtype=torch.bool), total, torch.zeros_like(total))


def _finite(gradients: Sequence[Tensor | None], _: object) -> tuple[Tensor | None, ...]:
    """The gradients with zeros in the place of NaN and infinity; what reached this graph from it is zero."""
    return tuple(None if g is None else torch.where(g.isfinite(), g, torch.zeros_like(g)) for g in gradients)

"""Losses and gradients of each task by plain autograd, one task at a time, to check probes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_dist.engines import replayed
from mtl_dist.losses import Features, Heads, LayerInput, LocalLosses, real, split
from mtl_dist.probes import in_words
from mtl_dist.stats import LocalStats


@dataclass(frozen=True)
class Explicit:
    """One rank's losses and gradients, each task by itself.

    Attributes:
        stats: as a probe would measure them; None where the probe does not measure at the features.
        gradients: of each task, one tensor per leaf; None for a task that is absent or has no gradient.
        present: tasks with a loss on this rank.
        losses: of the tasks present.
    """

    stats: LocalStats | None
    gradients: Sequence[Sequence[Tensor] | None]
    present: Sequence[bool]
    losses: Sequence[Tensor | None]


def detached(features: Any) -> Features:
    """Detached features, from any form that a probe may receive."""
    if isinstance(features, LayerInput):
        with torch.no_grad(), replayed(leaf.device for leaf in split(features.input, detach=True).leaves):
            return split(features.layer(features.input), detach=True)
    if callable(features):
        with torch.no_grad(), replayed([torch.empty(0).device]):
            return split(features(), detach=True)
    return split(features, detach=True)


def measure(shared: Features, heads: Heads, *, with_stats: bool) -> Explicit:
    """Each task's loss and gradient at detached features, in an evaluation that leaves no trace."""
    with replayed(leaf.device for leaf in shared.leaves), torch.enable_grad(), in_words():
        local = heads.at(shared.rebuild(), shared.leaves[0].device)
        means = _present_means(local)
        gradients = [_gradient(loss, shared) for loss in means]
    pairs = torch.outer(local.counts, local.counts)
    stats = local.stats(pairs * _gram(gradients, local.counts)) if with_stats else None
    losses = [None if loss is None else loss.detach() for loss in means]
    present = [loss is not None for loss in losses]
    return Explicit(stats, gradients, present, losses)


def _present_means(local: LocalLosses) -> list[Tensor | None]:
    return [mean if count > 0 else None for mean, count in zip(local.means(), local.counts, strict=True)]


def _gradient(loss: Tensor | None, shared: Features) -> Sequence[Tensor] | None:
    if loss is None or not loss.requires_grad:
        return None
    gradients = torch.autograd.grad(loss, shared.leaves, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in gradients):
        return None
    return [
        torch.zeros_like(leaf) if gradient is None else gradient
        for gradient, leaf in zip(gradients, shared.leaves, strict=True)
    ]


def _gram(gradients: Sequence[Sequence[Tensor] | None], counts: Tensor) -> Tensor:
    length = next((sum(real(g).numel() for g in leaves) for leaves in gradients if leaves is not None), 0)
    rows = [
        torch.zeros(length, dtype=counts.dtype, device=counts.device)
        if leaves is None
        else torch.cat([real(g).flatten().to(counts.dtype) for g in leaves])
        for leaves in gradients
    ]
    matrix = torch.stack(rows)
    return matrix @ matrix.T


def rows_touched(gradient: Sequence[Tensor]) -> Tensor:
    """`[B]` bool: samples where any leaf of at least two dimensions has a gradient."""
    batched = [g for g in gradient if g.dim() > 1] or list(gradient)
    size = len(batched[0]) if batched[0].dim() else 1
    same = [g for g in batched if g.dim() and len(g) == size] or [batched[0][None]]
    return torch.cat([g.reshape(size, math.prod(g.shape[1:])) for g in same], 1).ne(0).any(1)

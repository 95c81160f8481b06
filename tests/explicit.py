"""Ground truth by plain autograd on one process: what every probe must reproduce."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Rule

Heads = Mapping[str, Callable[[Tensor], Tensor]]


def explicit_gram(features: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    """`[n]` losses and `[n, n]` Gram of full gradients at the features, one backward a task, in float64."""
    losses, rows = [], []
    for head in heads.values():
        leaf = features.detach().requires_grad_()
        loss = head(leaf)
        loss.backward()
        losses.append(loss.detach().double())
        rows.append(torch.zeros_like(leaf).flatten() if leaf.grad is None else leaf.grad.flatten())
    matrix = torch.stack(rows).double()
    return torch.stack(losses), matrix @ matrix.T


def explicit_weights(rule: Rule, features: Tensor, heads: Heads) -> Tensor:
    """`[n]` weights of a fresh rule at its first step."""
    losses, gram = explicit_gram(features, heads)
    stats = TaskStats(losses, torch.ones(len(losses), dtype=torch.bool), gram, torch.ones(len(losses)))
    weights, _ = rule.update(stats, rule.init(list(heads), torch.device("cpu")))
    return weights


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter's gradient; zeros where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in module.named_parameters()
    }

"""ParameterProbe on trunks and tasks of unusual kinds, against plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import Balancer, ParameterProbe, SharedLayerProbe
from mtl_dist.weighting import MGDA, InverseGradNorm

Losses = dict[str, Callable]
LOSSES: Losses = {
    "a": lambda z: (z[0] * z[1]).square().mean(),
    "b": lambda z: (z[0] - 1).square().mean() + 2 * z[1].sum(),
    "c": lambda z: (z[0] + 3 * z[1]).tanh().mean(),
}


class Fork(nn.Module):
    """Two features, each through layers of its own, from one layer below."""

    def __init__(self, branches: int = 1) -> None:
        super().__init__()
        self.base = nn.Linear(4, 6)
        self.left = nn.Linear(6, 5)
        self.right = nn.ModuleList(nn.Linear(6, 5) for _ in range(branches))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        below = self.base(x).tanh()
        return self.left(below), torch.stack([layer(below).tanh() for layer in self.right]).sum(0)


def explicit(trunk: nn.Module, x: Tensor, losses: Losses) -> Tensor:
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss(trunk(x)), list(trunk.parameters()))
        rows.append(torch.cat([g.flatten() for g in found]).double())
    return torch.stack(rows) @ torch.stack(rows).T


@pytest.mark.parametrize("branches", [1, 4])
@pytest.mark.parametrize("bucket", [1, 40, 1 << 20])
@pytest.mark.parametrize("names", ["a", "ac", "abc"])
def test_gradients_that_meet_again_below_add(names: str, bucket: int, branches: int) -> None:
    """Any number of tasks, to the last digits of float64."""
    torch.manual_seed(0)
    trunk, x = Fork(branches).double(), torch.randn(7, 4, dtype=torch.float64)
    losses = {name: LOSSES[name] for name in names}
    balancer = Balancer(list(names), InverseGradNorm(), probe=ParameterProbe(bucket=bucket))
    balancer(trunk(x), losses).backward()
    torch.testing.assert_close(balancer.report.stats.gram, explicit(trunk, x, losses), rtol=1e-12, atol=1e-14)


def test_the_smallest_settings_work_and_smaller_ones_are_refused() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(7, 4)
    heads = {"a": lambda z: z.square().mean(), "b": lambda z: z.sum()}
    balancer = Balancer(["a", "b"], MGDA(), probe=ParameterProbe(every=1, bucket=1, sketch=1))
    balancer(layer(x), heads).backward()
    layered = Balancer(["a", "b"], MGDA(), probe=SharedLayerProbe(sketch=1))
    layered(x, heads, layer=layer).backward()
    for gram in (balancer.report.stats.gram, layered.report.stats.gram):
        assert torch.linalg.matrix_rank(gram) == 1, "a sketch of one number"
    for name in ("every", "bucket", "sketch"):
        with pytest.raises(ValueError, match=f"{name} must be .*at least 1, got 0"):
            ParameterProbe(**{name: 0})

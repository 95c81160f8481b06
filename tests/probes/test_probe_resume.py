"""A resumed run measures as the whole run does, bit for bit, whatever the sizes of its batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mtl_dist import (
    Balancer,
    FeatureProbe,
    FeatureTap,
    ParameterProbe,
    SharedLayerProbe,
    checkpoint,
)
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, Smooth

TASKS = ("a", "b", "c")
ROWS = (2, 30, 3, 30, 2, 30)
PROBES: dict[str, Probe] = {
    "feature": FeatureProbe(),
    "tap": FeatureTap(),
    "parameter": ParameterProbe(),
    "parameter every": ParameterProbe(every=2),
    "parameter sketch": ParameterProbe(sketch=8),
    **{form: SharedLayerProbe(form=form) for form in ("auto", "exact", "kernel")},
    "layer sketch": SharedLayerProbe(sketch=8),
}


class Net(nn.Module):
    def __init__(self, probe: Probe, lag: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.last = nn.Linear(4, 16), nn.Linear(16, 16)
        self.heads = nn.ModuleList(nn.Linear(16, 2) for _ in TASKS)
        self.balancer = Balancer(TASKS, Smooth(MGDA(), 0.5), probe=probe, lag=lag)

    def forward(self, x: Tensor) -> Tensor:
        heads = {t: (lambda z, i=i: self.heads[i](z).square().mean() + i) for i, t in enumerate(TASKS)}
        hidden = self.trunk(x).tanh()
        if isinstance(self.balancer.probe, SharedLayerProbe):
            return self.balancer(hidden, heads, layer=self.last)
        return self.balancer(self.last(hidden), heads)


def train(net: Net, first: int, last: int) -> Tensor:
    for step in range(first, last):
        x = torch.randn(ROWS[step], 4, generator=torch.Generator().manual_seed(step))
        net.zero_grad()
        net(x).backward()
        with torch.no_grad():
            for parameter in net.parameters():
                parameter -= 0.1 * parameter.grad
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("name", PROBES)
def test_resume_is_bitwise(name: str, lag: int, tmp_path: Path) -> None:
    expected = train(Net(PROBES[name], lag), 0, len(ROWS))
    for saved in range(1, len(ROWS)):
        half, resumed = Net(PROBES[name], lag), Net(PROBES[name], lag)
        train(half, 0, saved)
        checkpoint.save(half.balancer, tmp_path)
        resumed.load_state_dict(half.state_dict())
        checkpoint.load(resumed.balancer, tmp_path)
        assert torch.equal(train(resumed, saved, len(ROWS)), expected), saved


def test_the_batches_would_choose_different_forms() -> None:
    """Otherwise the test above shows nothing for `form="auto"`."""
    chosen = []
    for rows in ((2,), (30,)):
        net = Net(SharedLayerProbe(), 0)
        net(torch.randn(*rows, 4)).backward()
        chosen.append(net.balancer.state_dict()["probe.forms"].tolist())
    assert chosen == [[[3, 16, 16, 1]], [[3, 16, 16, 0]]]


def test_what_a_probe_kept_is_looked_at() -> None:
    net = Net(SharedLayerProbe(), 0)
    train(net, 0, 1)
    state = net.balancer.state_dict()
    for wrong in (torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 4)):
        with pytest.raises(ValueError, match=r"state 'probe\.forms' must be int64 of shape \[k, 4\]"):
            Net(SharedLayerProbe(), 0).balancer.load_state_dict({**state, "probe.forms": wrong})
    other = Net(FeatureProbe(), 0)
    other.balancer.load_state_dict(state)
    assert "probe.forms" not in other.balancer.state_dict()
    net.balancer.load_state_dict(Net(SharedLayerProbe(), 0).balancer.state_dict())
    assert "probe.forms" not in net.balancer.state_dict(), "it goes back to the beginning"

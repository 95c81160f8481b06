"""Kinds of layers that SharedLayerProbe meets, and ranks that gather their rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from mtl_dist import Balancer, SharedLayerProbe
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA

TASKS = ("a", "b")


def heads(shift: Tensor | float = 0.0) -> dict:
    return {"a": lambda z: (z - shift).square().mean(), "b": lambda z: (z.tanh() - shift - 1).square().mean()}


def explicit(layer: nn.Module, x: Tensor, parameter: Tensor, shift: Tensor | float = 0.0) -> Tensor:
    found = [torch.autograd.grad(head(layer(x)), parameter)[0].flatten() for head in heads(shift).values()]
    matrix = torch.stack(found).double()
    return matrix @ matrix.T


def test_a_normalised_weight_is_computed_once_as_without_the_balancer() -> None:
    """Its parametrization takes one step of an iteration whenever the weight is read."""
    torch.manual_seed(0)
    layer, alone = spectral_norm(nn.Linear(6, 5)), spectral_norm(nn.Linear(6, 5))
    alone.load_state_dict(layer.state_dict())
    x = torch.randn(8, 6)
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe())
    for _ in range(3):
        balancer(x, heads(), layer=layer).backward()
        alone(x)
        for name, buffer in alone.named_buffers():
            assert torch.equal(dict(layer.named_buffers())[name], buffer), name


class Conv1D(nn.Module):
    """As transformers' linear layer, whose weight is the other way round."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out)), nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


def test_a_linear_layer_of_transformers_is_measured_unless_something_changes_its_output() -> None:
    layer, x = Conv1D(5, 6), torch.randn(8, 6)
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe())
    balancer(x, heads(), layer=layer).backward()
    torch.testing.assert_close(
        balancer.report.stats.gram, explicit(layer, x, layer.weight), rtol=1e-5, atol=0
    )
    layer.register_forward_hook(lambda module, inputs, z: 2 * z)
    with pytest.raises(ValueError, match="layer=Conv1D is not its weight times its input"):
        Balancer(TASKS, MGDA(), probe=SharedLayerProbe())(x, heads(), layer=layer)


@pytest.mark.parametrize(("form", "groups"), [("exact", 1), ("exact", 2), ("kernel", 1)])
def test_the_gradients_some_columns_or_rows_at_a_time(
    form: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As wide layers are measured."""
    layer, x = nn.Conv1d(4, 6, 2, groups=groups), torch.randn(3, 4, 5)
    for module in ("products", "kernel"):
        monkeypatch.setattr(f"mtl_dist.probes.shared_layer.{module}.BLOCK", 32)
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe(form=form))
    balancer(x, heads(), layer=layer).backward()
    torch.testing.assert_close(
        balancer.report.stats.gram, explicit(layer, x, layer.weight), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("form", ["exact", "kernel", "auto"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_rows_of_several_ranks_that_all_tasks_share(form: str, ranks: int) -> None:
    torch.manual_seed(1)
    layer, x, shift = nn.Linear(20, 4), torch.randn(6, 20), torch.randn(6, 4)
    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe(form=form))
    virtual = VirtualRanks(ranks, balancer, nn.ModuleList([balancer, layer]))
    shards = virtual.split({"x": x, "shift": shift})

    def work(rank: int) -> Tensor:
        total = balancer(shards[rank]["x"], heads(shards[rank]["shift"]), layer=layer)
        (total / ranks).backward()
        return total

    virtual.run(work)
    expected = explicit(layer, x, layer.weight, shift)
    torch.testing.assert_close(balancer.report.stats.gram, expected, rtol=1e-5, atol=0)

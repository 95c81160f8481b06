"""Small changes of the code that once no test noticed: each test here fails for one of them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mtl_dist import Balancer, FeatureProbe, ParameterProbe, SharedLayerProbe
from mtl_dist.losses import GivenSampleLosses
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA, CoBa, Equal, InverseGradNorm

TASKS = ("a", "b", "c")


def samples(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of 12 samples with their tasks, in no order, and a mask of several weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor([2, 0, 0, 1, 2, 2, 0, 1, 2, 0, 2, 2])
    mask = torch.tensor([1.0, 0, 2, 1, 0.5, 0, 1, 3, 1, 1, 0, 2])
    return torch.rand(12, generator=generator, dtype=torch.float64), ids, mask.double()


def test_the_mean_of_a_task_counts_its_own_samples_by_their_mask() -> None:
    losses, ids, mask = samples()
    read = GivenSampleLosses(ids, mask, TASKS, lambda flag, explain: None).at(losses)
    for task, mean in enumerate(read.means()):
        own = ids == task
        expected = (mask * losses)[own].sum() / mask[own].sum()
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)
        assert read.counts[task] == mask[own].sum()
        assert read.stats().loss_sums[task] == pytest.approx((expected * mask[own].sum()).item())


@pytest.mark.parametrize("probe", [FeatureProbe(reevaluate=True), FeatureProbe()], ids=repr)
def test_a_mixture_evaluated_twice_compares_masked_means(probe: FeatureProbe) -> None:
    """A loss that changes where the mask is 0 is the same loss."""
    _, ids, mask = samples()
    z = torch.randn(12, 3, dtype=torch.float64, requires_grad=True)
    calls: list[int] = []

    def losses(z: Tensor) -> Tensor:
        calls.append(1)
        hidden = torch.where(mask == 0, float(len(calls)), 0.0)
        return z.square().mean(1) + hidden

    Balancer(TASKS, MGDA(), probe=probe)(z, losses, task_ids=ids, mask=mask).backward()
    assert len(calls) == (2 if probe.reevaluate else 1)


def test_a_task_that_does_not_count_adds_nothing_to_the_gram_of_parameters() -> None:
    torch.manual_seed(0)
    trunk = nn.Linear(4, 3).double()
    heads = {task: lambda z, k=k: (z - k).square().mean() for k, task in enumerate(TASKS)}
    balancer = Balancer(TASKS, InverseGradNorm(), probe=ParameterProbe())
    counts = {"a": torch.tensor(4.0), "b": torch.tensor(0.0), "c": torch.tensor(2.0)}
    balancer(trunk(torch.randn(5, 4).double()), heads, counts=counts)
    gram = balancer.report.stats.gram
    assert not gram[1].any()
    assert not gram[:, 1].any()
    assert gram[0, 0] > 0
    assert gram[0, 2] != 0


@pytest.mark.parametrize("form", ["exact", "kernel"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_row_of_a_layer_belongs_to_its_own_task(form: str, ranks: int) -> None:
    """Against explicit autograd; with ranks, the rows and their tasks travel."""
    torch.manual_seed(1)
    _, ids, _ = samples()
    x, layer = torch.randn(12, 20), nn.Linear(20, 4)
    targets = torch.randn(12, 4)

    def losses(z: Tensor, targets: Tensor) -> Tensor:
        return (z.tanh() - targets).square().mean(1)

    rows = []
    for task in range(3):
        own = ids == task
        (found,) = torch.autograd.grad(losses(layer(x), targets)[own].mean(), layer.weight)
        rows.append(found.flatten().double())
    expected = torch.stack(rows) @ torch.stack(rows).T

    balancer = Balancer(TASKS, MGDA(), probe=SharedLayerProbe(form=form))
    model = nn.ModuleList([balancer, layer])
    virtual = VirtualRanks(ranks, balancer, model)
    shards = virtual.split({"x": x, "ids": ids, "targets": targets})

    def work(rank: int) -> Tensor:
        own = shards[rank]
        total = balancer(own["x"], lambda z: losses(z, own["targets"]), task_ids=own["ids"], layer=layer)
        (total / ranks).backward()
        return total

    virtual.run(work)
    torch.testing.assert_close(balancer.report.stats.gram, expected, rtol=1e-5, atol=1e-9)


def test_a_task_without_gradient_is_no_sign_of_orthogonal_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """One gradient alone says nothing about angles; two tasks that share samples are never told."""
    balancer = Balancer(["a", "b"], MGDA())
    with caplog.at_level(logging.WARNING, logger="mtl_dist"):
        for _ in range(20):
            z = torch.randn(4, 3, requires_grad=True)
            balancer(z, {"a": lambda z: z.square().mean(), "b": lambda z: 0 * z.sum() + 1})
    assert not [record for record in caplog.records if "orthogonal" in record.message]


@pytest.mark.parametrize("probe", [ParameterProbe(sketch=8), SharedLayerProbe(sketch=8)], ids=repr)
def test_every_step_draws_a_new_sketch_and_a_resumed_one_the_same(probe: object) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 6), torch.randn(5, 30)
    heads = {task: lambda z, k=k: (z - k).square().mean() for k, task in enumerate(TASKS)}

    def grams(balancer: Balancer, steps: int) -> list[Tensor]:
        found = []
        for _ in range(steps):
            if isinstance(probe, SharedLayerProbe):
                balancer(x, heads, layer=layer)
            else:
                balancer(layer(x), heads)
            found.append(balancer.report.stats.gram)
        return found

    balancer = Balancer(TASKS, MGDA(), probe=probe)
    first, second, third = grams(balancer, 3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    resumed = Balancer(TASKS, MGDA(), probe=probe)
    resumed.load_state_dict({**balancer.state_dict(), "step": 1})
    assert torch.equal(grams(resumed, 2)[0], second)


def test_losses_without_a_graph_are_told_once_where_they_count(caplog: pytest.LogCaptureFixture) -> None:
    def told(losses: dict, **given: object) -> int:
        caplog.clear()
        balancer = Balancer(TASKS, Equal())
        for _ in range(2):
            assert balancer(losses, **given).requires_grad, "ready for a backward"
        return len([record for record in caplog.records if "no loss has a graph" in record.message])

    constant = torch.ones(())
    assert told({"a": constant, "b": None}) == 1
    assert told({"a": constant, "b": constant}, counts={"a": 0, "b": 1}) == 1
    assert told(torch.ones(2), task_ids=torch.tensor([0, 2])) == 1
    assert told({"a": constant.clone().requires_grad_(), "b": constant}) == 0
    assert told({"a": None}) == 0, "a rank without samples"
    assert told({"a": constant}, counts={"a": 0}) == 0


def test_two_empty_features_are_no_two_views_of_one() -> None:
    x = torch.ones(4, 3, requires_grad=True) * 1
    heads = {task: lambda z: z[0].sum() + z[1].sum() for task in TASKS}
    balancer = Balancer(TASKS, MGDA())
    balancer((x[:0], x[:0]), heads)
    with pytest.raises(ValueError, match="two views of the same numbers"):
        balancer((x[:2], x[:2]), heads)


@pytest.mark.parametrize("window", [None, 3])
def test_everything_goes_to_the_device_of_the_losses(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floating-point numbers in the precision of its statistics."""
    balancer = Balancer(TASKS, CoBa(), window=window)
    for _ in range(2):
        balancer({task: torch.ones((), requires_grad=True) for task in TASKS})
    precision = {"cpu": torch.float64, "meta": torch.float32}
    monkeypatch.setattr("mtl_dist.balancer.progress.stats_dtype", lambda device: precision[device.type])
    balancer.eval()({task: torch.ones((), device="meta") for task in TASKS})
    progress = vars(balancer._progress)
    progress["window's"] = vars(progress["_window"].total)
    kept = [value for value in tree_leaves(progress) if isinstance(value, Tensor)]
    assert len(kept) > 5
    for value in kept:
        assert value.device.type == "meta"
        assert value.dtype == torch.float32 or not value.is_floating_point()
    assert balancer.step == (2 if window is None else 0)
    assert progress["_before"].step == 0
    assert progress["_window"].calls == (0 if window is None else 2)


@pytest.mark.parametrize("calls", [0, 2, 3])
def test_a_state_inside_a_window_goes_into_another_balancer(calls: int) -> None:
    first, second = (Balancer(TASKS, MGDA(), window=3) for _ in range(2))
    heads = {task: lambda z, k=k: (z - k).square().mean() for k, task in enumerate(TASKS)}
    z = torch.ones(4, 3, requires_grad=True) * 1
    for _ in range(calls):
        first(z, heads)
    state = first.state_dict()
    assert state["window.calls"] == calls % 3
    second.load_state_dict(state)
    for key, value in second.state_dict().items():
        assert torch.equal(value, state[key]) if isinstance(value, Tensor) else value == state[key], key
    for _ in range(3 - calls % 3):
        assert torch.equal(first(z, heads), second(z, heads))
    assert second.step == first.step == calls // 3 + 1

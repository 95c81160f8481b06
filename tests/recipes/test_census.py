"""Rows become features and labels, histograms give the area under the curve, the Gram of MMoE is complete."""

from __future__ import annotations

import pytest
import torch
from sklearn.metrics import roc_auc_score
from standins import provide

from mtl_dist import Balancer, FeatureProbe
from mtl_dist.recipes import Census
from mtl_dist.recipes.census.auc import auc, histograms
from mtl_dist.recipes.census.table import CATEGORIES, NUM_BUCKETS, TASKS
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import MGDA, Equal, InverseLoss

SIZE = {"num_train": 512, "num_validation": 203}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packages")
    provide(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield Census(**SIZE).data(seed=0)


def test_rows_are_those_of_their_part_and_of_the_seed(data):
    train, test = data
    assert (len(train), len(test)) == (512, 203)
    assert train.numbers.shape[1] + len(CATEGORIES) == 38
    assert int(train.categories.min()) >= 0
    assert int(train.categories.max()) < NUM_BUCKETS
    assert train.numbers.abs().max() < 2
    assert 0 < train.labels[:, 0].mean() < train.labels[:, 1].mean()


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_area_under_the_curve_is_that_of_scikit_learn(spread):
    rng = torch.Generator().manual_seed(0)
    labels = (torch.rand(5000, generator=rng) < 0.06).float()
    logits = spread * (torch.randn(5000, generator=rng) + labels) - 2
    counts = histograms(logits, labels).tolist()
    assert auc(counts) == pytest.approx(roc_auc_score(labels, logits), abs=2e-4)
    assert auc([0.0] * len(counts)) == 0.5


@pytest.mark.parametrize("network", ["shared_bottom", "mmoe"])
def test_validation_sums_add_over_uneven_and_empty_parts(data, network):
    recipe = Census(network=network, **SIZE)
    balancer = Balancer(recipe.tasks, InverseLoss())
    net, test = recipe.model(balancer), data[1]
    batch = test.__getitems__(range(203))
    net(**batch)
    net.eval()
    with torch.no_grad():
        expected = net(**batch)
        added = sum(net(**test.__getitems__(part)) for part in (range(9), range(9, 9), range(9, 203)))
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)
    row = eval_row(expected, recipe)
    for task, loss in balancer.report.losses.items():
        assert row[f"eval/loss/{task}"] == pytest.approx(loss, rel=1e-5)


def test_under_gates_experts_and_inputs_together_hold_the_whole_gradient(data):
    """The embedding gets its gradient through the experts and through the gates: both are in the Gram.

    With one sample, the gradient of all shared parameters below z is a linear function of that at z. If z
    were the experts alone, the part of the gates would be missing there.
    """
    recipe = Census(**SIZE)
    torch.manual_seed(0)
    net = recipe.model(Balancer(recipe.tasks, MGDA(), probe=FeatureProbe()))
    batch = data[0].__getitems__(range(32))
    taken = {}

    class Recorder(torch.nn.Module):
        def forward(self, z, heads, counts):
            z = tuple(part.view_as(part) for part in z())  # as the balancer does: x leads to the experts
            taken["z"], taken["losses"] = z, [head(z) for head in heads.values()]
            return z[0].sum()

    net(**batch)
    gram = net.balancer.report.stats.gram
    net.balancer = Recorder()
    net(**batch)
    rows = [torch.autograd.grad(loss, taken["z"], retain_graph=True) for loss in taken["losses"]]
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    torch.testing.assert_close(gram, matrix @ matrix.T, rtol=1e-5, atol=1e-12)
    gates = torch.stack([row[1].flatten() for row in rows])
    assert bool((gates.norm(dim=1) > 0).all())
    # z cuts the network: what arrives at the embedding through z is all that arrives there
    shared = net.embedding.weight
    for loss, row in zip(taken["losses"], rows, strict=True):
        (whole,) = torch.autograd.grad(loss, shared, retain_graph=True)
        (through,) = torch.autograd.grad(taken["z"], shared, row, retain_graph=True)
        torch.testing.assert_close(through, whole, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("network", ["shared_bottom", "mmoe"])
def test_it_learns_every_task(data, network):
    recipe = Census(network=network, **SIZE)
    torch.manual_seed(0)
    net = recipe.model(Balancer(recipe.tasks, Equal()))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for step in range(80):
        net(**data[0].__getitems__(range(step % 4 * 128, step % 4 * 128 + 128))).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        row = eval_row(net.eval()(**data[0].__getitems__(range(512))), recipe)
    for task in TASKS:
        assert row[f"eval/{task}/auc"] > 0.85, row


def test_what_is_wrong_is_refused():
    with pytest.raises(ValueError, match=r'network must be "shared_bottom" or "mmoe", got .ple'):
        Census(network="ple")
    with pytest.raises(ValueError, match="experts must be at least 1, got 0"):
        Census(experts=0)

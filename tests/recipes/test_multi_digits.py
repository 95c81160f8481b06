"""The data do not leak, the model learns, and its validation sums add."""

from __future__ import annotations

import math

import pytest
import torch

from mtl_dist import Balancer
from mtl_dist.recipes import MultiDigits
from mtl_dist.recipes.multi_digits import psnr
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import GeometricMean, InverseGradNorm

RECIPE = MultiDigits(num_train=2048, num_validation=301)


@pytest.fixture(scope="module")
def data():
    return RECIPE.data(seed=0)


def whole(samples):
    return samples.__getitems__(range(len(samples)))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_source_digit_is_in_both_parts(seed):
    train, validation = RECIPE.data(seed)
    assert not set(train.sources.unique().tolist()) & set(validation.sources.unique().tolist())


def test_the_split_is_the_same_for_every_seed():
    # otherwise a run resumed or compared across seeds would validate on what another trained on
    held_out = [set(MultiDigits(10, 5000).data(seed)[1].sources.unique().tolist()) for seed in (0, 1)]
    assert held_out[0] == held_out[1]
    assert len(held_out[0]) == 1797 // 5


def test_data_are_a_function_of_the_seed(data):
    again, other = RECIPE.data(seed=0), RECIPE.data(seed=1)
    for part in (0, 1):
        assert torch.equal(data[part].images, again[part].images)
        assert torch.equal(data[part].digits, again[part].digits)
        assert not torch.equal(data[part].images, other[part].images)


def test_canvas_holds_the_two_digits_that_the_labels_name(data):
    from sklearn.datasets import load_digits

    digits = load_digits()
    train = data[0]
    assert torch.equal(train.digits, torch.from_numpy(digits.target).long()[train.sources])
    assert float(train.images.min()) >= 0
    assert float(train.images.max()) <= 1
    # the brighter pixel wins: a canvas has at least each digit's ink, at most both digits' ink
    ink = torch.from_numpy(digits.images).float().div(16).sum((1, 2))[train.sources]
    found = train.images.sum((1, 2, 3))
    assert bool((found >= ink.amax(1) - 1e-4).all())
    assert bool((found <= ink.sum(1) + 1e-4).all())
    assert bool((found < ink.sum(1) - 1e-2).any()), "no pair overlaps: the offsets make the task trivial"


def test_losses_start_at_very_different_scales(data):
    torch.manual_seed(0)
    balancer = Balancer(RECIPE.tasks, GeometricMean())
    RECIPE.model(balancer)(**whole(data[1])).backward()
    losses = balancer.report.losses
    assert losses["left"] == pytest.approx(math.log(10), rel=0.1)
    assert losses["sum"] > 20 * losses["left"]
    assert losses["image"] > 5 * losses["left"]


def test_validation_sums_add_over_uneven_and_empty_parts(data):
    model = RECIPE.model(Balancer(RECIPE.tasks, GeometricMean())).eval()
    validation = data[1]
    with torch.no_grad():
        expected = model(**whole(validation))
        parts = [range(7), range(7, 7), range(7, 300), range(300, 301)]
        added = sum(model(**validation.__getitems__(part)) for part in parts)
    assert added.dtype == torch.float64
    torch.testing.assert_close(added, expected, rtol=1e-6, atol=1e-6)
    assert added[:, 2].tolist() == [301] * 4


def test_training_and_validation_losses_are_the_same_function(data):
    balancer = Balancer(RECIPE.tasks, GeometricMean())
    model = RECIPE.model(balancer)
    model(**whole(data[1]))
    row = eval_row(model.eval()(**whole(data[1])), RECIPE)
    for task, loss in balancer.report.losses.items():
        assert row[f"eval/loss/{task}"] == pytest.approx(loss, rel=1e-5)


def test_five_epochs_learn_every_task(data):
    torch.manual_seed(0)
    train, validation = data
    model = RECIPE.model(Balancer(RECIPE.tasks, InverseGradNorm()))

    def score():
        with torch.no_grad():
            return eval_row(model.eval()(**whole(validation)), RECIPE)

    before = score()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    model.train()
    for step in range(160):
        batch = train.__getitems__(range(step % 32 * 64, (step % 32 + 1) * 64))
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    after = score()
    for task in ("left", "right"):
        assert after[f"eval/{task}/accuracy"] > before[f"eval/{task}/accuracy"] + 0.2
    assert after["eval/sum/mae"] < before["eval/sum/mae"] / 2
    assert after["eval/image/psnr"] > before["eval/image/psnr"] + 3


def test_psnr_of_a_known_error():
    assert psnr(0.01) == pytest.approx(20)
    assert psnr(0) == math.inf


def test_sizes_below_one_are_refused():
    with pytest.raises(ValueError, match="num_train must be at least 1, got 0"):
        MultiDigits(num_train=0)

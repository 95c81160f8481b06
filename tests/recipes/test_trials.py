"""The parts of the recipes' benchmarks: trainings that go on, and reference losses that are what they say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sequence_labelling import fitted_constant
from benchmarks.side_tuning import kept_for_backward
from benchmarks.trials import Plan, Store, cell, trained
from mtl_dist import Balancer
from mtl_dist.recipes import MultiDigits
from mtl_dist.training.evaluate import eval_row
from mtl_dist.weighting import Equal

PLAN = Plan(steps=3, batch=32, learning_rate=1e-3)


def test_a_store_goes_on_with_the_same_setting_and_begins_anew_with_another(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"value": 2.0}

    for setting in ({"recipe": "a"}, {"recipe": "a"}, {"recipe": "b"}):
        assert Store(tmp_path / "results.json", PLAN, setting).get("equal 0", make) == {"value": 2.0}
    assert len(made) == 2
    assert cell([1.0, 3.0], 1) == "2.0 ± 1.0"


def test_a_training_ends_with_the_validation_of_all_samples():
    recipe = MultiDigits(num_train=96, num_validation=701, channels=2, features=8)
    data = recipe.data(0)
    model, row = trained(recipe, Balancer(recipe.tasks, Equal()), data, PLAN, seed=0)
    with torch.no_grad():
        expected = eval_row(model(**data[1].__getitems__(range(701))), recipe)
    assert not model.training
    assert row.pop("cpu_ms") > 0
    assert row == pytest.approx(expected, rel=1e-5)


def test_constant_emissions_of_a_softmax_have_the_entropy_of_the_labels():
    labels = torch.tensor([[0, 1, 1, 2], [2, 2, 0, 0]])
    batch = {"characters": torch.tensor([[5, 5, 5, 5], [5, 5, 0, 0]]), "words": labels}
    shares = torch.tensor([1.0, 2.0, 3.0]) / 6
    entropy = -(shares * shares.log()).sum().item()
    assert fitted_constant("softmax", "words", batch) == pytest.approx(entropy, abs=1e-3)
    # a MEMM knows the label before: fewer nats for each token
    assert fitted_constant("memm", "words", batch) < fitted_constant("softmax", "words", batch)


def test_what_is_kept_for_the_backward_is_counted_once():
    class Square(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4, 4))

        def forward(self, x):
            return ((x @ self.weight) ** 2).sum()

    # x for the gradient of the weight, and the product for the square; not the weight
    assert kept_for_backward(Square(), {"x": torch.ones(8, 4)}) == 2 * 8 * 4 * 4

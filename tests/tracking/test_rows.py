"""The keys are a contract; every value is checked against its definition."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from mtl_dist.stats import StepReport, TaskStats
from mtl_dist.tracking import step_row
from mtl_dist.tracking.rows import entropy

TASKS = ("a", "b", "c")


def report(weights, losses, gradients=None, present=(True, True, True), held=False):
    vectors = None if gradients is None else torch.tensor(gradients, dtype=torch.float64)
    stats = TaskStats(
        losses=torch.tensor(losses, dtype=torch.float64),
        present=torch.tensor(present),
        gram=None if vectors is None else vectors @ vectors.T,
        counts=torch.ones(3, dtype=torch.float64),
        step=6,
    )
    return StepReport(TASKS, stats, torch.tensor(weights, dtype=torch.float64), torch.tensor(held))


def test_row_of_a_full_step():
    gradients = [[3.0, 4.0], [-3.0, 4.0], [0.0, -2.0]]
    row = step_row(report([0.5, 0.3, 0.2], [1.0, 2.0, 3.0], gradients), global_step=7)
    assert row == pytest.approx(
        {
            "train/global_step": 7,
            "train/loss": 0.5 * 1 + 0.3 * 2 + 0.2 * 3,
            "mtl/weight/a": 0.5,
            "mtl/weight/b": 0.3,
            "mtl/weight/c": 0.2,
            "mtl/loss/a": 1.0,
            "mtl/loss/b": 2.0,
            "mtl/loss/c": 3.0,
            "mtl/grad_norm/a": 5.0,
            "mtl/grad_norm/b": 5.0,
            "mtl/grad_norm/c": 2.0,
            "mtl/contribution/a": 2.5,
            "mtl/contribution/b": 1.5,
            "mtl/contribution/c": 0.4,
            "mtl/cosine/a__b": 7 / 25,
            "mtl/cosine/a__c": -0.8,
            "mtl/cosine/b__c": -0.8,
            "mtl/conflict_rate": 2 / 3,
            "mtl/weight_entropy": -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)),
        }
    )
    assert isinstance(row["train/global_step"], int)


def test_what_does_not_exist_is_left_out():
    gradients = [[3.0, 4.0], [0.0, 0.0], [0.0, 0.0]]
    row = step_row(report([1.0, 0.0, 1.0], [1.0, 1.0, 3.0], gradients, present=(True, False, True)), 1)
    assert row["mtl/weight/b"] == 0
    assert not any(key in row for key in ("mtl/loss/b", "mtl/grad_norm/b", "mtl/contribution/b"))
    # c has a zero gradient: a norm, but no angle with anything
    assert row["mtl/grad_norm/c"] == 0
    assert not any(key.startswith("mtl/cosine/") or key == "mtl/conflict_rate" for key in row)
    assert row["train/loss"] == 4.0


def test_without_gradients_there_are_no_gradient_columns():
    row = step_row(report([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]), 1)
    assert set(row) == {
        *(f"mtl/{kind}/{task}" for kind in ("weight", "loss") for task in TASKS),
        *("train/global_step", "train/loss", "mtl/weight_entropy"),
    }


def test_a_held_step_says_so():
    row = step_row(report([0.5, 0.5, 0.0], [math.inf, 1.0, 1.0], held=True), 1)
    assert row["mtl/held"] == 1
    assert row["train/loss"] == math.inf


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 1, 1], math.log(3)),
        ([5, 0, 0], 0),
        ([0, 0], 0),
        ([2e300, 2e300], math.log(2)),
        ([-1, 1], math.log(2)),
    ],
)
def test_entropy(weights, expected):
    assert entropy(weights) == pytest.approx(expected)


def test_pairs_follow_the_order_of_tasks():
    row = step_row(report([1.0] * 3, [1.0] * 3, [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]), 1)
    assert [key for key in row if "cosine" in key] == [
        f"mtl/cosine/{a}__{b}" for a, b in combinations(TASKS, 2)
    ]

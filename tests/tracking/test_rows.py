"""The keys are a contract; every value is checked against its definition."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch

from mtl_dist.stats import Elapsed, StepReport, TaskStats
from mtl_dist.tracking import Snapshot, step_row
from mtl_dist.tracking.rows import entropy

TASKS = ("a", "b", "c")


def report(weights, losses, gradients=None, present=(True, True, True), held=False, tasks=TASKS, counts=None):
    vectors = None if gradients is None else torch.tensor(gradients, dtype=torch.float64)
    stats = TaskStats(
        losses=torch.tensor(losses, dtype=torch.float64),
        present=torch.tensor(present),
        gram=None if vectors is None else vectors @ vectors.T,
        counts=torch.tensor(present if counts is None else counts, dtype=torch.float64),
        step=6,
    )
    return StepReport(tasks, stats, torch.tensor(weights, dtype=torch.float64), torch.tensor(held))


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
            "mtl/contribution/a": 2.5 / 4.4,
            "mtl/contribution/b": 1.5 / 4.4,
            "mtl/contribution/c": 0.4 / 4.4,
            "mtl/cosine/a__b": 7 / 25,
            "mtl/cosine/a__c": -0.8,
            "mtl/cosine/b__c": -0.8,
            "mtl/conflict_rate": 2 / 3,
            "mtl/weight_entropy": -sum(p * math.log(p) for p in (0.5, 0.3, 0.2)),
            "perf/sync_ms": 0,
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
        *("train/global_step", "train/loss", "mtl/weight_entropy", "perf/sync_ms"),
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


def test_micro_batches_of_one_step_are_one_batch():
    """The window's losses and Gram are those of the concatenated samples, by the definition in stats.py."""
    torch.manual_seed(0)
    counts = torch.tensor([[3.0, 1.0, 0.0], [2.0, 4.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    losses = torch.rand(3, 3, dtype=torch.float64) + 1
    # gradients of local means at the features of each micro-batch: other features, other coordinates
    gradients = torch.randn(3, 3, 5, dtype=torch.float64) * (counts > 0)[..., None]
    weights = torch.rand(3, 3, dtype=torch.float64) * (counts > 0)
    reports = [
        report(w.tolist(), loss.tolist(), g.tolist(), present=(c > 0).tolist(), counts=c.tolist())
        for w, loss, g, c in zip(weights, losses, gradients, counts, strict=True)
    ]
    row = Snapshot(reports).row(5)

    total = counts.sum(0)
    mean = (counts * losses).sum(0) / total
    whole = (
        torch.cat([c[:, None] * g for c, g in zip(counts, gradients, strict=True)], dim=1) / total[:, None]
    )
    assert row["mtl/loss/a"] == pytest.approx(mean[0].item())
    assert row["mtl/grad_norm/b"] == pytest.approx(whole[1].norm().item())
    cosine = whole[0] @ whole[1] / whole[0].norm() / whole[1].norm()
    assert row["mtl/cosine/a__b"] == pytest.approx(cosine.item())
    assert row["mtl/weight/a"] == pytest.approx(weights[:, 0].mean().item())
    assert row["mtl/weight/b"] == pytest.approx(weights[:2, 1].mean().item())  # where the task was present
    assert row["train/loss"] == pytest.approx((weights * losses).sum(1).mean().item())
    assert row["mtl/weight/c"] == 0
    assert "mtl/loss/c" not in row


def test_a_window_takes_gradients_where_they_were_measured():
    measured = report([1.0] * 3, [1.0] * 3, [[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    plain = report([1.0] * 3, [3.0] * 3, held=True)
    row = Snapshot([measured, plain]).row(1)
    assert row["mtl/loss/a"] == 2
    assert row["mtl/grad_norm/b"] == pytest.approx(math.sqrt(2))
    assert row["mtl/held"] == 1
    assert not any(key.startswith("mtl/grad_norm") for key in Snapshot([plain, plain]).row(1))


def test_the_time_of_a_window_is_the_sum():
    slow = replace(report([1.0] * 3, [1.0] * 3), sync=Elapsed((0.25,)))
    assert Snapshot([slow, slow]).row(1)["perf/sync_ms"] == 500


@pytest.mark.parametrize("name", ["", "a b", "a/b", "<script>", "a__b", "größe"])
def test_names_that_no_key_can_carry(name):
    with pytest.raises(ValueError, match="cannot be part of a column name: use letters"):
        step_row(report([1.0] * 3, [1.0] * 3, tasks=("a", name, "c")), 1)
    with pytest.raises(ValueError, match="the model's forward did not call the balancer"):
        Snapshot([])


def test_names_that_are_fine():
    row = step_row(report([1.0] * 3, [1.0] * 3, tasks=("Seg_1", "x.y", "z-2")), 1)
    assert row["mtl/weight/Seg_1"] == 1


def test_a_row_is_one_copy(monkeypatch):
    """An accelerator would be waited for at each of them."""
    copies = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: copies.append("tolist"))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: copies.append("item"))
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: [copies.append("numpy"), numpy(self)][1])
    vectors = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    ones = torch.ones(3, dtype=torch.float64)
    stats = TaskStats(ones, ones > 0, vectors @ vectors.T, ones)
    step_row(StepReport(TASKS, stats, ones, torch.tensor(False)), 1)
    assert copies == ["numpy"]

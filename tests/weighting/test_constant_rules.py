"""Rules of the losses' scale: fixed, initial, prior, inverse loss, inverse gradient norm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import Fixed, InitialLoss, InverseGradNorm, InverseLoss, PriorLoss, TokenShare

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal")


def stats(losses, *, present=(True, True, True), gram=None, step=0):
    losses = torch.tensor(losses, dtype=torch.float64)
    present = torch.tensor(present)
    return TaskStats(losses, present, gram, present.double(), step)


@pytest.mark.parametrize(
    ("rule", "weights"),
    [
        (Fixed({"normal": 3.0, "depth": 1.0, "segment": 0.0}), [1.0, 0.0, 3.0]),
        (Fixed([1, 0, 3]), [1.0, 0.0, 3.0]),
        (PriorLoss({"segment": math.log(13), "depth": 0.25, "normal": 2.0}), [4.0, 1 / math.log(13), 0.5]),
        (InitialLoss(losses=[0.25, math.log(13), 2.0]), [4.0, 1 / math.log(13), 0.5]),
    ],
)
def test_constants_by_name_or_in_order(rule, weights):
    state = rule.init(TASKS, CPU)
    for step in range(3):
        got, state = rule.update(stats([9.0 + step, 1e-9, 4.0], step=step), state)
        torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64), rtol=1e-15, atol=0)


def test_token_share_is_the_mean_over_tokens():
    step = replace(
        stats([1.0, 2.0, 3.0], present=(True, False, True)), counts=torch.tensor([30.0, 0.0, 10.0])
    )
    weights, _ = TokenShare().update(step, {})
    assert weights.tolist() == [0.75, 0.0, 0.25]
    assert (weights @ step.losses.to(weights)).item() == (30 * 1.0 + 10 * 3.0) / 40


def test_initial_loss_is_the_mean_of_the_first_losses_then_stays():
    rule = InitialLoss(steps=3)
    losses = [[1.0, 10.0, 8.0], [2.0, 20.0, 8.0], [6.0, 30.0, 8.0], [0.1, 0.1, 0.1], [50.0, 50.0, 50.0]]
    means = [[1.0, 10.0, 8.0], [1.5, 15.0, 8.0], [3.0, 20.0, 8.0], [3.0, 20.0, 8.0], [3.0, 20.0, 8.0]]
    state = rule.init(TASKS, CPU)
    for step, (loss, mean) in enumerate(zip(losses, means, strict=True)):
        weights, state = rule.update(stats(loss, step=step), state)
        torch.testing.assert_close(weights, 1 / torch.tensor(mean, dtype=torch.float64), rtol=1e-15, atol=0)


def test_initial_loss_counts_only_steps_where_the_task_is_present():
    rule, state = InitialLoss(steps=2), None
    state = rule.init(TASKS, CPU)
    here = (True, True, True)
    for loss, present in [(2.0, here), (1.0, (True, False, True)), (4.0, here), (100.0, here)]:
        weights, state = rule.update(stats([2.0, loss, 2.0], present=present), state)
    assert weights.tolist() == [1 / 2, 1 / 3, 1 / 2]


def test_initial_loss_of_a_task_never_seen_is_finite():
    rule = InitialLoss()
    weights, _ = rule.update(stats([2.0, 1.0, 4.0], present=(True, False, True)), rule.init(TASKS, CPU))
    assert weights.tolist() == [0.5, 1.0, 0.25]


def test_only_a_measured_initial_loss_needs_positive_losses():
    assert InitialLoss().positive_losses
    assert not InitialLoss(losses=[1.0, 1.0, 1.0]).positive_losses


def test_inverse_loss_is_the_gradient_of_the_sum_of_logs():
    losses = torch.tensor([1e-9, 0.3, 1e6], dtype=torch.float64, requires_grad=True)
    losses.log().sum().backward()
    weights, _ = InverseLoss().update(stats(losses.tolist()), {})
    torch.testing.assert_close(weights, losses.grad, rtol=1e-15, atol=0)


def test_inverse_grad_norm_gives_gradients_of_length_one():
    gradients = torch.randn(3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients *= torch.tensor([[1e-9], [1.0], [1e9]])
    weights, _ = InverseGradNorm().update(stats([1.0, 1.0, 1.0], gram=gradients @ gradients.T), {})
    torch.testing.assert_close((weights[:, None] * gradients).norm(dim=1), torch.ones(3).double())


def test_inverse_grad_norm_of_a_zero_gradient_is_the_smallest_weight():
    gram = torch.diag(torch.tensor([4.0, 0.0, 0.25], dtype=torch.float64))
    assert InverseGradNorm().update(stats([1.0] * 3, gram=gram), {})[0].tolist() == [0.5, 0.5, 2.0]
    assert InverseGradNorm().update(stats([1.0] * 3, gram=0 * gram), {})[0].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed([1.0, -2.0]), r"Fixed: weights must be finite and non-negative, got \[1\.0, -2\.0\]"),
        (lambda: Fixed({"a": math.nan}), "Fixed: weights must be finite"),
        (lambda: PriorLoss({"a": 0.0}), r"PriorLoss: losses must be finite and positive, got \{'a': 0\.0\}"),
        (lambda: InitialLoss(losses=[math.inf]), "InitialLoss: losses must be finite and positive, got"),
        (lambda: InitialLoss(steps=0), "InitialLoss: steps must be an integer >= 1, got 0"),
        (lambda: InitialLoss(steps=2.5), r"InitialLoss: steps must be an integer >= 1, got 2\.5"),
        (lambda: Fixed({"depth": 1.0}).init(TASKS, CPU), "Fixed: weights must give one value for each task"),
        (lambda: PriorLoss([1.0]).init(TASKS, CPU), "PriorLoss: losses must give one value for each task"),
    ],
)
def test_bad_values_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()

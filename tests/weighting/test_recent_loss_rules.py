"""Rules of losses that appeared since: against their official code's formula, differentiated, or TorchJD."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import KLBalance

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal", "edges")


def stats(losses, step=0, present=None):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    present = torch.ones(len(losses), dtype=torch.bool) if present is None else torch.tensor(present)
    return TaskStats(losses.detach(), present, None, present.double(), step)


def assert_close(got, expected, rtol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


# KLBalance

SCALES = {"depth": 1.0, "segment": 4.0, "normal": 16.0}


def kl_samples(num, seed=0):
    """`[num, 3]`, KL terms of samples."""
    rng = torch.Generator().manual_seed(seed)
    return torch.tensor([0.02, 3.0, 40.0]) * torch.rand(num, 3, generator=rng, dtype=torch.float64)


def nvae_weights(samples, beta):
    """`[3]`, weights of the batch means of the KL terms in NVAE's objective, where it balances."""
    samples = samples.clone().requires_grad_()
    size = samples.abs().mean(0) + 0.01
    coefficient = size / torch.tensor(list(SCALES.values())) * size.sum()
    coefficient = (coefficient / coefficient.mean()).detach()
    (beta * (samples * coefficient).sum(1)).mean().backward()
    return samples.grad.sum(0)


@pytest.mark.parametrize(("step", "beta"), [(0, 1e-4), (10, 1e-4), (60, 0.25), (209, 199 / 200)])
def test_kl_balance_is_nvaes_objective_on_the_whole_batch(step, beta):
    rule, samples = KLBalance(SCALES, warmup=200, start=10), kl_samples(64)
    losses = [*samples.mean(0).tolist(), 900.0]
    mine, _ = rule.update(stats(losses, step), rule.init(TASKS, CPU))
    assert rule.beta(step) == pytest.approx(beta)
    assert_close(mine[:3], nvae_weights(samples, beta))
    assert mine[3] == 1
    # the published code on two ranks: each balances by its own half, and only gradients are averaged
    halves = [nvae_weights(half, beta) for half in (samples[:32], samples[32:])]
    gap = (torch.stack(halves) / mine[:3] - 1).abs().amax()
    assert gap > 0.02


@pytest.mark.parametrize("step", [210, 211, 10_000])
def test_kl_balance_leaves_the_bound_alone_after_the_warm_up(step):
    rule = KLBalance(SCALES, warmup=200, start=10)
    mine, _ = rule.update(stats([0.1, 2.0, 30.0, 900.0], step), rule.init(TASKS, CPU))
    assert mine.tolist() == [1.0] * 4


def test_kl_balance_balances_the_terms_present():
    rule = KLBalance(SCALES, warmup=200)
    state = rule.init(TASKS, CPU)
    mine, _ = rule.update(stats([0.09, 1.0, 15.99, 900.0], 100, (True, False, True, True)), state)
    # r = 0.1/1 and 16/16, mean 0.55
    assert_close(mine[[0, 2, 3]], torch.tensor([0.5 * 0.1 / 0.55, 0.5 / 0.55, 1.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLBalance({}, 10), "KLBalance: scales must name at least one KL term, got none"),
        (lambda: KLBalance({"a": 0.0}, 10), "KLBalance: scales must be finite and positive"),
        (lambda: KLBalance({"a": 1.0}, 0), "KLBalance: warmup must be an integer >= 1, got 0"),
        (
            lambda: KLBalance({"a": 1.0}, 10).init(TASKS, CPU),
            r"KLBalance: scales must name tasks of \['depth'.*got \['a'\]",
        ),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()

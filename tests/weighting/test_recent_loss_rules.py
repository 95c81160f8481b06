"""Rules of losses that appeared since: against their official code's formula, differentiated, or TorchJD."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn
from torchjd import scalarization

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    COSMOS,
    LDCMTL,
    PBI,
    GO4Align,
    GroupDRO,
    KLBalance,
)

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal", "edges")
LOSSES = (0.03, 0.7, 1.1, 4.0)
PREFERENCE = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
IDEAL = torch.tensor([0.01, 0.5, -1.0, 3.0], dtype=torch.float64)


def stats(losses, step=0, present=None):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    present = torch.ones(len(losses), dtype=torch.bool) if present is None else torch.tensor(present)
    return TaskStats(losses.detach(), present, None, present.double(), step)


def assert_close(got, expected, rtol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


def story(steps):
    """Losses that fall at different rates, with noise."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(steps, 4, generator=rng, dtype=torch.float64)
    rate = torch.tensor([0.002, 0.01, 0.03, 0.0])
    start = torch.tensor(LOSSES, dtype=torch.float64)
    return start * torch.exp(-rate * torch.arange(steps)[:, None] + 0.05 * noise)


def run(rule, losses, tasks=TASKS):
    state = rule.init(tasks, CPU)
    result = []
    for step, row in enumerate(losses):
        weights, state = rule.update(stats(row, step), state)
        result.append(weights)
    return torch.stack(result)


def gradient(function, losses):
    losses = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    function(losses).backward()
    return losses.grad


# GroupDRO


def doremi(excesses, lr, smoothing):
    """The domain weights of DoReMi's Algorithm 1 after each step."""
    alpha, result = torch.full((4,), 0.25, dtype=torch.float64), []
    for excess in excesses:
        alpha = alpha * torch.exp(lr * excess)
        alpha = (1 - smoothing) * alpha / alpha.sum() + smoothing / 4
        result.append(alpha)
    return torch.stack(result)


@pytest.mark.parametrize("smoothing", [0.0, 1e-3, 0.3])
def test_group_dro_is_doremis_algorithm(smoothing):
    references, losses = dict(zip(TASKS, (0.025, 0.72, 0.9, 3.9), strict=True)), story(60)
    excesses = (losses - torch.tensor(list(references.values()), dtype=torch.float64)).clamp(min=0)
    assert (excesses == 0).any(), "no loss is below its reference"
    mine = run(GroupDRO(references, lr=0.5, smoothing=smoothing), losses)
    assert_close(mine, doremi(excesses, 0.5, smoothing), rtol=1e-10)


def test_group_dro_without_references_goes_to_the_worst_task():
    mine = run(GroupDRO(lr=0.5), story(60))
    assert mine[-1].argmax() == 3
    assert mine[-1, 3] > 0.99


def test_group_dro_on_validation_losses_moves_only_there():
    rule, losses = GroupDRO(lr=0.5, source="validation"), story(5)
    state = rule.init(TASKS, CPU)
    for step, row in enumerate(losses):
        state = rule.observe(stats(row), state)
        for training in (row, 7 * row):
            weights, state = rule.update(stats(training, step), state)
            assert_close(weights, doremi(losses[: step + 1], 0.5, 1e-3)[-1], rtol=1e-10)
    with pytest.raises(ValueError, match="takes no losses from outside the step"):
        GroupDRO().observe(stats(LOSSES), state)


def test_group_dro_keeps_the_weight_of_an_absent_task():
    rule, here = GroupDRO(lr=0.5), (True, False, True, True)
    state = rule.init(TASKS, CPU)
    weights, state = rule.update(stats(LOSSES), state)
    share = weights[1]
    for _ in range(3):
        alone, state = rule.update(stats(LOSSES, present=here), state)
        assert_close(alone.masked_select(torch.tensor(here)).sum(), torch.tensor(1.0).double())
    back, _ = rule.update(stats([0.0, 0.0, 0.0, 0.0]), state)
    # a step without excess only mixes c/n in
    assert_close(back[1], 0.999 * share + 0.001 / 4)


# GO4Align


def best_groups(values, num_groups):
    """The mean of each value's group, of all partitions of the sorted values into intervals."""
    values, order = torch.sort(values)
    best, result = torch.inf, None
    for cuts in combinations(range(1, len(values)), num_groups - 1):
        parts = torch.tensor_split(values, cuts)
        cost = sum(((part - part.mean()) ** 2).sum() for part in parts)
        if cost < best:
            best = cost
            result = torch.cat([part.mean().expand(len(part)) for part in parts])
    return torch.empty_like(values).scatter(0, order, result)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 5])
def test_go4align_is_optimal_groups_of_the_codes_numbers(num_groups):
    tasks = [f"task{i}" for i in range(9)]
    losses = torch.exp(torch.randn(20, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    mine = run(GO4Align(num_groups, lr=0.01), losses, tasks)
    p = torch.full((9,), 1 / 9, dtype=torch.float64)
    for row, got in zip(losses, mine, strict=True):
        p = p * torch.exp(-0.01 * row)
        p = p / p.sum()
        assert_close(got, best_groups(row.sum() / row * p, num_groups), rtol=1e-10)
        assert len(set(got.tolist())) == num_groups


def test_go4align_of_as_many_groups_as_tasks_is_the_numbers_themselves():
    mine = run(GO4Align(7, lr=1e-9), [LOSSES])[0]
    losses = torch.tensor(LOSSES, dtype=torch.float64)
    assert_close(mine, losses.sum() / losses / 4, rtol=1e-8)


# LDC-MTL


@pytest.mark.parametrize("penalty", [0.0, 0.05, 0.8])
def test_ldc_mtl_is_the_codes_objective_under_torchs_adam(penalty):
    losses = story(100)
    mine = run(LDCMTL(penalty, lr=0.02), losses)
    w = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.Adam([w], lr=0.02)
    for row, got in zip(losses, mine, strict=True):
        row = row.clone().requires_grad_()
        # in units of min L(0), which is 0.03, so that Adam's ε is beside gradients of size 1
        x = torch.softmax(w, 0) * (row / losses[0])
        total = x.sum() + penalty * (x[:-1] - x[1:]).abs().sum()
        optimizer.zero_grad()
        total.backward()
        assert_close(got, row.grad * losses[0].min(), rtol=1e-9)
        optimizer.step()
    assert (mine < 0).any() == (penalty > 0.5)


def test_ldc_mtl_compares_neighbours_among_the_tasks_present():
    rule = LDCMTL(0.1)
    state = rule.init(TASKS, CPU)
    _, state = rule.update(stats([1.0, 1.0, 1.0, 1.0]), state)
    weights, _ = rule.update(stats([3.0, 9.0, 2.0, 1.0], 1, (True, False, True, True)), state)
    # σ = 1/3 each; signs of 3 - 2 and 2 - 1
    assert_close(weights[[0, 2, 3]], torch.tensor([1.1, 1.0, 0.9], dtype=torch.float64) / 3)


# COSMOS and PBI


@pytest.mark.parametrize("penalty", [0.0, 0.01, 8.0])
def test_cosmos_is_torchjds(penalty):
    theirs = scalarization.COSMOS(penalty, PREFERENCE)
    mine = run(COSMOS(penalty, PREFERENCE.tolist()), [LOSSES])[0]
    assert_close(mine, gradient(theirs, LOSSES))
    equal = scalarization.COSMOS(penalty, torch.full((4,), 0.25, dtype=torch.float64))
    assert_close(run(COSMOS(penalty), [LOSSES])[0], gradient(equal, LOSSES))


@pytest.mark.parametrize("theta", [0.0, 0.5, 5.0])
def test_pbi_is_torchjds(theta):
    theirs = scalarization.PBI(theta, PREFERENCE, IDEAL)
    mine = run(PBI(theta, PREFERENCE.tolist(), IDEAL.tolist()), [LOSSES])[0]
    # torchjd adds 1e-12 to the square of a distance of about 2
    assert_close(mine, gradient(theirs, LOSSES), rtol=1e-11)
    assert (mine < 0).any() == (theta > 0.5)


def test_pbi_on_the_preferred_direction_is_that_direction():
    mine = run(PBI(weights=PREFERENCE.tolist()), [(7 * PREFERENCE).tolist()])[0]
    assert_close(mine, PREFERENCE / PREFERENCE.norm())
    # one ulp away it is not the penalty's direction either
    assert_close(run(PBI(), [[0.1, 0.1, 0.1, 0.1 + 2**-55]])[0], torch.full((4,), 0.5).double())


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
        (lambda: GroupDRO(smoothing=1.0), r"GroupDRO: smoothing must be in \[0, 1\), got 1\.0"),
        (
            lambda: GroupDRO(source="both"),
            "GroupDRO: source must be one of .*, got 'both'",
        ),
        (
            lambda: GroupDRO({"a": 1.0}).init(TASKS, CPU),
            "references must give one value for each task",
        ),
        (lambda: GO4Align(0), "GO4Align: num_groups must be an integer >= 1, got 0"),
        (lambda: LDCMTL(-0.1), "LDCMTL: penalty must be finite and non-negative, got -0.1"),
        (lambda: COSMOS(-1.0), "COSMOS: penalty must be finite and non-negative, got -1"),
        (lambda: PBI(weights=[1.0, 0.0]), "PBI: weights must be finite and positive"),
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

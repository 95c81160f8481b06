"""Rules of losses against TorchJD where it is right, against autograd or the paper's formula elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from torchjd import scalarization

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    DWA,
    FAMO,
    IMTLL,
    RLW,
    STCH,
    CoBa,
    GeometricMean,
    LogSumExp,
    ReLoBRaLo,
    SoftAdapt,
    Uncertainty,
)
from mtl_dist.weighting.helpers import step_generator

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal", "edges")
LOSSES = (0.03, 0.7, 1.1, 4.0)


def stats(losses, step=0, present=None):
    losses = torch.as_tensor(losses, dtype=torch.float64)
    present = torch.ones(len(losses), dtype=torch.bool) if present is None else torch.tensor(present)
    return TaskStats(losses.detach(), present, None, present.double(), step)


def story(steps, seed=0):
    """Losses that fall at different rates, with noise."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(steps, 4, generator=rng, dtype=torch.float64)
    rate = torch.tensor([0.002, 0.01, 0.03, 0.0])
    start = torch.tensor(LOSSES, dtype=torch.float64)
    return start * torch.exp(-rate * torch.arange(steps)[:, None] + 0.05 * noise)


def run(rule, losses):
    state = rule.init(TASKS, CPU)
    result = []
    for step, row in enumerate(losses):
        weights, state = rule.update(stats(row, step), state)
        result.append(weights)
    return torch.stack(result), state


def gradient(function, losses):
    losses = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    function(losses).backward()
    return losses.grad


def assert_close(got, expected, rtol=1e-12):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


def filled(value):
    return torch.full((4,), value, dtype=torch.float64)


# fixed scalarisations: the weights are the gradient

LAMBDA = torch.tensor([0.4, 0.1, 0.2, 0.3], dtype=torch.float64)
IDEAL = torch.tensor([0.01, 0.5, -1.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("mu", [0.01, 1.0, 30.0])
def test_stch_is_torchjds(mu):
    mine, _ = STCH(mu).update(stats(LOSSES), STCH(mu).init(TASKS, CPU))
    assert_close(mine, gradient(scalarization.STCH(mu), LOSSES))
    rule = STCH(mu, weights=LAMBDA.tolist(), reference=IDEAL.tolist())
    theirs = scalarization.STCH(mu, LAMBDA, IDEAL)
    mine, _ = rule.update(stats(LOSSES), rule.init(TASKS, CPU))
    assert_close(mine, gradient(theirs, LOSSES))


def test_geometric_mean_is_torchjds():
    mine, _ = GeometricMean().update(stats(LOSSES), {})
    assert_close(mine, gradient(scalarization.GeometricMean(), LOSSES))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 30.0])
def test_log_sum_exp_is_the_gradient_of_the_smooth_maximum(temperature):
    mine, _ = LogSumExp(temperature).update(stats(LOSSES), {})

    def smooth_maximum(losses):
        return temperature * torch.logsumexp(losses / temperature, 0)

    assert_close(mine, gradient(smooth_maximum, LOSSES))


def test_smooth_maxima_of_huge_losses_do_not_overflow():
    mine, _ = LogSumExp(1e-3).update(stats([1e12, 1e12, 1.0, -1e12]), {})
    assert mine.tolist() == [0.5, 0.5, 0.0, 0.0]


# random weights


def test_rlw_is_softmax_of_normals_that_depend_on_seed_and_step_alone():
    draws = torch.stack([RLW(seed=5).update(stats(LOSSES, step), {})[0] for step in range(2000)])
    assert_close(draws.sum(1), torch.ones(2000, dtype=torch.float64))
    # differences of logs are differences of two standard normals, whose variance is 2
    gaps = draws[:, 0].log() - draws[:, 1].log()
    assert abs(gaps.mean()) < 4 * math.sqrt(2 / 2000)
    assert abs(gaps.var() - 2) < 4 * 2 * math.sqrt(2 / 2000)
    torch.manual_seed(99)
    assert torch.equal(RLW(seed=5).update(stats(LOSSES, 7), {})[0], draws[7])
    assert not torch.equal(RLW(seed=6).update(stats(LOSSES, 7), {})[0], draws[7])


# rules with a history


def test_dwa_is_torchjds():
    rule, theirs = DWA(interval=3, temperature=0.7), scalarization.DWA(0.7)
    mine, _ = run(rule, story(20))
    for step, row in enumerate(story(20)):
        assert_close(mine[step], gradient(theirs, row.tolist()))
        if step % 3 == 2:
            theirs.step()
    assert not torch.allclose(mine[-1], torch.ones(4).double(), rtol=1e-3)


def test_dwa_of_a_task_counts_its_own_steps():
    rule = DWA(interval=2)
    state = rule.init(TASKS, CPU)
    for step, row in enumerate(story(4)):
        _, state = rule.update(stats(row, step, (True, True, True, step % 2 == 0)), state)
    assert state["epochs"].tolist() == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("rate", "scale"), [("ratio", 4), ("difference", 4)], ids=["PhysicsNeMo-Sym", "paper, times n"]
)
def test_soft_adapt_is_the_formula(rate, scale):
    losses = story(6)
    mine, _ = run(SoftAdapt(beta=0.3, rate=rate), losses)
    assert_close(mine[0], torch.ones(4).double())
    for step in range(1, 6):
        now, before = losses[step], losses[step - 1]
        s = now / before if rate == "ratio" else now - before
        assert_close(mine[step], scale * torch.softmax(0.3 * s, 0))


def test_relobralo_is_the_formula_for_both_looks():
    rule, losses = ReLoBRaLo(alpha=0.8, beta=0.6, tau=0.5, seed=3), story(40)
    mine, _ = run(rule, losses)
    weights = torch.ones(4, dtype=torch.float64)
    looks = []
    for step, row in enumerate(losses):
        rho = torch.rand((), generator=step_generator(3, step), dtype=torch.float64) < 0.6
        looks.append(bool(rho))
        to_first = 4 * torch.softmax(row / (0.5 * losses[0]), 0)
        to_last = 4 * torch.softmax(row / (0.5 * losses[max(step - 1, 0)]), 0)
        weights = 0.8 * (weights if rho else to_first) + 0.2 * to_last
        assert_close(mine[step], weights)
    assert 0.3 < sum(looks) / 40 < 0.9


def test_relobralo_looks_back_as_often_as_asked():
    draws = [torch.rand((), generator=step_generator(0, step)).item() for step in range(4000)]
    assert abs(sum(draw < 0.99 for draw in draws) / 4000 - 0.99) < 4 * math.sqrt(0.99 * 0.01 / 4000)
    assert abs(sum(draws) / 4000 - 0.5) < 4 * math.sqrt(1 / 12 / 4000)


# learned scalars: the weights are dS/dL of TorchJD's module, the scalars follow torch.optim.Adam on it


@pytest.mark.parametrize(
    ("rule", "module"),
    [(Uncertainty(lr=0.05), scalarization.UW(4)), (IMTLL(lr=0.05), scalarization.IMTLL(4))],
    ids=["uncertainty", "imtl_l"],
)
def test_learned_scales_are_torchjds_under_torchs_adam(rule, module):
    module.double()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = story(200)
    mine, _ = run(rule, losses)
    for step, row in enumerate(losses):
        optimizer.zero_grad()
        expected = gradient(module, row.tolist())
        assert_close(mine[step], expected, rtol=1e-9)
        optimizer.step()


def test_imtl_l_is_twice_uncertainty():
    mine, _ = run(IMTLL(), story(50))
    # Adam does not see the factor, but for its ε beside gradients of 1: 1e-8 relative
    assert_close(mine, 2 * run(Uncertainty(), story(50))[0], rtol=1e-6)


def test_learned_scales_come_to_rest_at_the_inverse_loss():
    losses = torch.tensor(LOSSES, dtype=torch.float64).expand(3000, 4)
    for rule, factor in ((Uncertainty(), 0.5), (IMTLL(), 1.0)):
        mine, _ = run(rule, losses)
        assert_close(mine[-1] * losses[-1], filled(factor), rtol=1e-3)


def test_start_of_the_learned_scales():
    assert_close(run(Uncertainty(start=-0.5), story(1))[0][0], filled(0.5 * math.exp(0.5)))
    assert_close(run(IMTLL(start=1.0), story(1))[0][0], filled(math.e))


# FAMO


def famo_of_torchjd(before, after, bounds=None):
    """Weights of TorchJD's FAMO, told the losses before and after each step."""
    theirs = scalarization.FAMO(4, bounds, lr=0.05, weight_decay=0.01).double()
    result = []
    for row, updated in zip(before, after, strict=True):
        result.append(gradient(theirs, row.tolist()))
        theirs.update(updated)
    return torch.stack(result)


# TorchJD adds 1e-8 to every loss: of the smallest here, 0.02, that is 5e-7
FAMO_RTOL = 2e-6


def test_famo_with_feedback_after_the_step_is_torchjds():
    before, after = story(100), 0.99 * story(100, seed=1)
    rule = FAMO(lr=0.05, weight_decay=0.01, feedback="after")
    state, mine = rule.init(TASKS, CPU), []
    for step, (row, updated) in enumerate(zip(before, after, strict=True)):
        weights, state = rule.update(stats(row, step), state)
        state = rule.observe(stats(updated, step), state)
        mine.append(weights)
    assert_close(torch.stack(mine), famo_of_torchjd(before, after), rtol=FAMO_RTOL)


def test_famo_with_the_next_losses_is_torchjds_told_those():
    losses = story(100)
    mine, _ = run(FAMO(lr=0.05, weight_decay=0.01), losses)
    after = torch.cat([losses[1:], losses[-1:]])
    assert_close(mine, famo_of_torchjd(losses, after), rtol=FAMO_RTOL)


def test_famo_with_lower_bounds_is_torchjds():
    losses, bounds = story(30) - 5.0, torch.full((4,), -6.0, dtype=torch.float64)
    mine, _ = run(FAMO(lr=0.05, weight_decay=0.01, min_losses=bounds.tolist()), losses)
    after = torch.cat([losses[1:], losses[-1:]])
    assert_close(mine, famo_of_torchjd(losses, after, bounds), rtol=FAMO_RTOL)


def test_famo_gives_more_weight_to_what_falls_slowly():
    # the last task of the story does not fall at all
    mine, _ = run(FAMO(), story(300))
    shares = mine * story(300)
    assert shares[-1].argmax() == 3
    assert_close(mine.sum(1), torch.ones(300).double())


def test_famo_learns_from_a_loss_at_its_bound():
    mine, state = run(FAMO(min_losses=[0.03, 0, 0, 0]), [list(LOSSES)] * 3)
    # its distance counts as 1e-8 (|L| + |b|)
    assert mine[0, 0] / mine[0, 1] == pytest.approx(0.7 / (1e-8 * 0.06))
    assert all(value.isfinite().all() for value in state.values())


def test_only_famo_with_feedback_after_the_step_observes():
    rule = FAMO()
    assert not rule.observes
    with pytest.raises(ValueError, match=r"FAMO\(.*feedback='next'\) takes no losses from outside the step"):
        rule.observe(stats(LOSSES), rule.init(TASKS, CPU))


def test_famo_ignores_feedback_before_the_first_step():
    rule = FAMO(feedback="after")
    state = rule.init(TASKS, CPU)
    observed = rule.observe(stats(LOSSES), state)
    assert all(torch.equal(observed[key], value) for key, value in state.items())


@pytest.mark.parametrize(
    ("rule", "positive"),
    [
        (FAMO(), True),
        (FAMO(min_losses=[-9.0] * 4), False),
        (SoftAdapt(), True),
        (SoftAdapt(rate="difference"), False),
    ],
)
def test_positive_losses_are_asked_for_where_they_are_divided_by(rule, positive):
    assert rule.positive_losses is positive


# CoBa


def coba_by_the_paper(history, window, tau):
    """Weights after these validation losses, in plain Python from the paper's equations 2 to 7."""
    ratios = history / history[0]
    slopes = []
    for t in range(1, len(ratios)):
        recent = ratios[max(0, t + 1 - window) : t + 1]
        x = torch.arange(len(recent), dtype=torch.float64)
        design = torch.stack([x, torch.ones_like(x)], 1)
        slopes.append(torch.linalg.lstsq(design, recent).solution[0])
    slopes = torch.stack(slopes)[-window:]
    n, count = slopes.shape[1], len(slopes)
    rcs = torch.softmax(n * slopes[-1] / slopes[-1].abs().sum(), 0)
    acs = torch.softmax(-count * slopes[-1] / slopes.abs().sum(0), 0)
    worst = slopes.amax(1)
    factor = (count * torch.softmax(-tau * count * worst / worst.abs().sum(), 0)[-1]).clamp(max=1)
    return factor * rcs + (1 - factor) * acs, factor


@pytest.mark.parametrize("window", [4, 30])
def test_coba_is_the_papers_equations(window):
    rule, history = CoBa(warmup=3, window=window, tau=2.0), story(25, seed=4)
    history[15:, 3] *= 1.2 ** torch.arange(10)  # a task that diverges
    state, factors = rule.init(TASKS, CPU), []
    for t, row in enumerate(history):
        state = rule.observe(stats(row), state)
        weights, _ = rule.update(stats(LOSSES), state)
        if t < 2:
            assert weights.tolist() == [0.25] * 4
            continue
        expected, factor = coba_by_the_paper(history[: t + 1], window, 2.0)
        factors.append(factor)
        assert_close(weights, expected, rtol=1e-8)
    assert min(factors) < 0.9  # both scores were at work
    assert max(factors) == 1


def test_coba_turns_away_from_a_task_that_diverges():
    rule = CoBa(warmup=5, window=10)
    falling = torch.linspace(1, 0.5, 20).double()
    rising = torch.cat([falling[:12], falling[11] + 0.2 * torch.arange(1, 9)])
    state, weights = rule.init(TASKS, CPU), []
    for good, bad in zip(falling, rising, strict=True):
        state = rule.observe(stats([good, good, good, bad]), state)
        weights.append(rule.update(stats(LOSSES), state)[0])
    assert weights[11][3] == pytest.approx(0.25)
    assert weights[-1][3] < 0.1 < weights[-1][0]


def test_coba_keeps_the_history_of_a_task_without_validation_losses():
    rule = CoBa(warmup=2, window=6)
    state = rule.init(TASKS, CPU)
    for row in story(3):
        state = rule.observe(stats(row), state)
    later = rule.observe(stats(LOSSES, present=(True, True, False, True)), state)
    assert torch.equal(later["ratios"][:, 2], state["ratios"][:, 2])
    assert later["seen"].tolist() == [4, 4, 3, 4]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DWA(interval=0), "DWA: interval must be an integer >= 1, got 0"),
        (lambda: DWA(temperature=0.0), r"DWA: temperature must be finite and positive, got 0\.0"),
        (lambda: STCH(mu=-1.0), r"STCH: mu must be finite and positive, got -1\.0"),
        (lambda: STCH(weights=[0.0, 1.0]), "STCH: weights must be finite and positive"),
        (lambda: LogSumExp(0.0), "LogSumExp: temperature must be finite and positive, got 0"),
        (lambda: Uncertainty(lr=0.0), r"Uncertainty: lr must be finite and positive, got 0\.0"),
        (lambda: IMTLL(lr=-1.0), r"IMTLL: lr must be finite and positive, got -1\.0"),
        (lambda: FAMO(weight_decay=-1.0), "FAMO: weight_decay must be finite and non-negative, got -1"),
        (lambda: FAMO(feedback="later"), "FAMO: feedback must be one of 'next', 'after', got 'later'"),
        (lambda: SoftAdapt(rate="slope"), "SoftAdapt: rate must be one of .*, got 'slope'"),
        (lambda: ReLoBRaLo(beta=1.5), r"ReLoBRaLo: beta must be in \[0, 1\], got 1\.5"),
        (lambda: CoBa(warmup=1), "CoBa: warmup must be an integer >= 2, got 1"),
    ],
)
def test_bad_values_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()

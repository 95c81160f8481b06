"""Loops that take one task per batch: told once, and `LastSeen` gives them their rule."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mtl_dist import RULES, Balancer, Rule
from mtl_dist.stats import TaskStats
from mtl_dist.weighting import (
    DBMTL,
    DWA,
    IMTLG,
    MGDA,
    AlignedMTL,
    Encodec,
    Equal,
    FairGrad,
    Fixed,
    GeometricMean,
    GradNorm,
    InverseGradNorm,
    InverseLoss,
    LastSeen,
    NashMTL,
    NTKBalance,
)

TASKS = ("a", "b", "c")
SCALES = {"a": 1.0, "b": 10.0, "c": 100.0}


def heads(z: Tensor, seed: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Losses whose gradients differ by their scale alone."""
    return {
        task: lambda z, s=SCALES[task], t=number: s * ((z[:, t] - 1).square().mean() + 1)
        for number, task in enumerate(TASKS)
    }


def weights(rule: Rule, *, one_task: bool, steps: int = 30) -> dict[str, float]:
    """Each task's weight at the last step that used it."""
    balancer, used = Balancer(TASKS, rule), {}
    z = torch.zeros(8, 3, requires_grad=True)
    for step in range(steps):
        everything = heads(z, step)
        given = {TASKS[step % 3]: everything[TASKS[step % 3]]} if one_task else everything
        balancer(z, given)
        used |= {task: balancer.report.weights[task] for task in given}
    return used


KNOWING = [
    MGDA(),
    IMTLG(),
    NashMTL(),
    AlignedMTL(),
    FairGrad(),
    InverseGradNorm(),
    Encodec(),
    DBMTL(),
    NTKBalance(),
]


@pytest.mark.parametrize("rule", [*KNOWING, GeometricMean(), InverseLoss()], ids=repr)
def test_the_latest_statistics_give_the_weights_of_whole_batches(rule: Rule) -> None:
    """Here each task touches a feature of its own, so that zero is the right cosine."""
    together, in_turn = weights(rule, one_task=False), weights(LastSeen(rule), one_task=True)
    assert in_turn == pytest.approx(together, rel=1e-6)


def test_without_it_most_rules_give_equal_weights() -> None:
    assert len({round(w, 9) for w in weights(MGDA(), one_task=True).values()}) == 1, "the test cannot fail"


def test_whole_batches_are_what_the_inner_rule_makes_of_them() -> None:
    z = torch.randn(8, 3, requires_grad=True, generator=None)
    plain, kept = Balancer(TASKS, MGDA()), Balancer(TASKS, LastSeen(MGDA()))
    for step in range(3):
        plain(z, heads(z, step))
        kept(z, heads(z, step))
        assert kept.weights == pytest.approx(plain.weights, rel=1e-9)


def test_cosines_of_different_steps_fit_together() -> None:
    """Three pairs that each conflict strongly, measured at three steps: no such three vectors exist."""
    rule, n = LastSeen(MGDA()), 3
    state, seen = rule.init(TASKS, torch.device("cpu")), []
    for pair in ([0, 1], [1, 2], [0, 2]):
        gram = torch.zeros(n, n, dtype=torch.float64)
        gram[pair[0], pair[1]] = gram[pair[1], pair[0]] = -0.9
        present = torch.zeros(n, dtype=torch.bool)
        present[pair] = True
        gram[present.nonzero(), present.nonzero()] = 1.0
        ones = torch.ones(n, dtype=torch.float64)
        stats = TaskStats(ones, present, gram, ones * present)

        class Spy(type(rule.rule)):
            def update(self, stats: TaskStats, state: dict) -> tuple[Tensor, dict]:
                seen.append(stats.gram)
                return super().update(stats, state)

        weights, state = LastSeen(Spy()).update(stats, state)
        assert weights.isfinite().all()
    for gram in seen:
        assert torch.linalg.eigvalsh(gram).min() >= -1e-12
    assert seen[-1][0, 2] < 0, "conflicts are still seen"


def told(rule: Rule, caplog: pytest.LogCaptureFixture, *, one_task: bool) -> int:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="mtl_dist"):
        weights(rule, one_task=one_task, steps=40)
    return sum("samples of one task only" in record.message for record in caplog.records)


@pytest.mark.parametrize("rule", [MGDA(), DWA(), GradNorm(lr=1e-12)], ids=repr)
def test_a_rule_that_comes_out_as_equal_weights_is_told_once(rule: Rule, caplog) -> None:
    assert told(rule, caplog, one_task=True) == 1
    assert told(rule, caplog, one_task=False) == 0


@pytest.mark.parametrize(
    "rule", [Equal(), Fixed([1.0, 1.0, 1.0]), InverseLoss(), InverseGradNorm(), LastSeen(MGDA())], ids=repr
)
def test_nothing_is_said_where_nothing_is_wrong(rule: Rule, caplog) -> None:
    assert told(rule, caplog, one_task=True) == 0


def test_one_task_alone_is_no_loop(caplog) -> None:
    balancer = Balancer(TASKS, MGDA())
    with caplog.at_level(logging.WARNING, logger="mtl_dist"):
        for _ in range(20):
            z = torch.randn(4, 3, requires_grad=True)
            balancer(z, {"a": lambda z: z.square().mean()})
    assert not caplog.records
    assert "mgda" in RULES

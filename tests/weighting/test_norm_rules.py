"""Rules of gradient norms against autograd of the papers' objectives on a small network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mtl_dist.stats import TaskStats
from mtl_dist.weighting import DBMTL, Encodec, GradNorm, NTKBalance

CPU = torch.device("cpu")
TASKS = ("depth", "segment", "normal")


class Problem:
    """Three regressions of very different scale on one trunk."""

    def __init__(self):
        torch.manual_seed(0)
        self.trunk = nn.Linear(6, 5).double()
        self.heads = nn.ModuleList(nn.Linear(5, 2) for _ in TASKS).double()
        self.rng = torch.Generator().manual_seed(1)
        self.scales = torch.tensor([1e-3, 1.0, 30.0], dtype=torch.float64)

    def losses(self):
        x = torch.randn(7, 6, generator=self.rng, dtype=torch.float64)
        y = torch.randn(3, 7, 2, generator=self.rng, dtype=torch.float64)
        z = torch.tanh(self.trunk(x))
        return torch.stack(
            [s * (head(z) - t).square().mean() for s, head, t in zip(self.scales, self.heads, y, strict=True)]
        )

    def gradients(self, losses, **kwargs):
        """`[3, P]`, of each loss at the shared parameters."""
        rows = []
        for loss in losses:
            parts = torch.autograd.grad(loss, list(self.trunk.parameters()), retain_graph=True, **kwargs)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    def measure(self, step=0):
        losses = self.losses()
        rows = self.gradients(losses)
        present = torch.ones(3, dtype=torch.bool)
        return losses, TaskStats(losses.detach(), present, rows @ rows.T, present.double(), step)


def stats(losses, norms, present=(True, True, True)):
    present = torch.tensor(present)
    gram = torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2)
    return TaskStats(torch.tensor(losses, dtype=torch.float64), present, gram, present.double())


def assert_close(got, expected, rtol=1e-9):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_grad_norm_is_the_papers_double_backward_under_torchs_adam(alpha):
    problem, rule = Problem(), GradNorm(alpha=alpha, lr=0.01)
    state = rule.init(TASKS, CPU)
    w = nn.Parameter(torch.ones(3, dtype=torch.float64))
    # eps 0 as the rule has it; the default 1e-8 acts on the first task's gradients of 1e-3
    optimizer = torch.optim.Adam([w], lr=0.01, eps=0.0)
    first = None
    for step in range(60):
        losses, measured = problem.measure(step)
        weights, state = rule.update(measured, state)
        assert_close(weights, w.detach())

        # the paper's Algorithm 1, differentiated twice
        norms = problem.gradients(w * losses, create_graph=True).norm(dim=1)
        first = losses.detach() if first is None else first
        progress = losses.detach() / first
        target = (norms.mean() * (progress / progress.mean()) ** alpha).detach()
        (w.grad,) = torch.autograd.grad((norms - target).abs().sum(), w)
        optimizer.step()
        with torch.no_grad():
            w.mul_(3 / w.sum())
    assert (weights - 1).abs().max() > 0.1


def test_grad_norm_brings_the_weighted_norms_together():
    rule = GradNorm(alpha=0.0)
    state = rule.init(TASKS, CPU)
    for _ in range(400):
        weights, state = rule.update(stats([1.0, 1.0, 1.0], [1.0, 2.0, 4.0]), state)
    lengths = weights * torch.tensor([1.0, 2.0, 4.0])
    assert lengths.max() / lengths.min() < 1.1
    assert weights.sum() == pytest.approx(3)


def test_grad_norm_pulls_the_slow_task_harder():
    rule = GradNorm(alpha=1.0)
    state = rule.init(TASKS, CPU)
    for step in range(200):
        fall = 0.99**step
        weights, state = rule.update(stats([1.0, fall, fall], [1.0, 1.0, 1.0]), state)
    assert weights[0] > 1.5 > weights[1]


def test_grad_norm_never_goes_below_zero_and_comes_back():
    rule = GradNorm(alpha=1.5, lr=0.5)
    state, seen = rule.init(TASKS, CPU), []
    for step in range(60):
        weights, state = rule.update(stats([1.0, 1.0, 1.0], [1.0, 1.0, 50.0 if step < 30 else 1.0]), state)
        seen.append(weights)
    assert torch.stack(seen).min() == 0
    assert seen[-1].min() > 0.1


def test_grad_norm_of_a_task_alone_is_one_whatever_it_had_among_others():
    rule = GradNorm()
    state = rule.init(TASKS, CPU) | {"w": torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)}
    weights, after = rule.update(stats([1.0] * 3, [0.0, 0.0, 5.0], (False, False, True)), state)
    assert weights[2] == 1
    assert after["w"].tolist() == [2.0, 1.0, 1.0]


def test_ntk_balance_is_autograd_of_the_root_of_the_loss():
    problem = Problem()
    losses, measured = problem.measure()
    roots = problem.gradients(losses.sqrt()).norm(dim=1)
    for power in (1.0, 2.0):
        kernel = roots**power
        assert_close(NTKBalance(power).update(measured, {})[0], kernel.sum() / kernel)


def test_ntk_balance_of_a_zero_gradient_is_the_smallest_weight():
    weights, _ = NTKBalance(1.0).update(stats([1.0, 1.0, 4.0], [4.0, 0.0, 4.0]), {})
    assert weights.tolist() == [2.5, 2.5, 5.0]
    assert NTKBalance().update(stats([1.0] * 3, [0.0] * 3), {})[0].tolist() == [3.0] * 3


def test_db_mtl_is_log_losses_brought_to_the_longest_gradient():
    problem = Problem()
    losses, measured = problem.measure()
    logs = problem.gradients(losses.log())
    lengths = logs.norm(dim=1)
    direction = (lengths.max() * logs / lengths[:, None]).sum(0)
    weights, _ = DBMTL().update(measured, {})
    got = weights @ problem.gradients(losses)
    assert (got - direction).norm() < 1e-12 * direction.norm()


def test_db_mtl_of_a_zero_gradient_is_the_smallest_weight():
    assert DBMTL().update(stats([2.0, 1.0, 1.0], [4.0, 0.0, 1.0]), {})[0].tolist() == [0.5, 0.5, 2.0]
    assert DBMTL().update(stats([2.0, 1.0, 1.0], [0.0] * 3), {})[0].tolist() == [1.0] * 3


def test_encodec_is_the_share_of_the_length_over_the_corrected_average():
    shares = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    rule = Encodec(shares.tolist(), total_norm=2.0, decay=0.9)
    state, norms = rule.init(TASKS, CPU), []
    problem = Problem()
    for step in range(10):
        _, measured = problem.measure(step)
        norms.append(measured.grad_norms)
        weights, state = rule.update(measured, state)
        discounts = 0.9 ** torch.arange(step, -1, -1, dtype=torch.float64)
        average = (discounts[:, None] * torch.stack(norms)).sum(0) / discounts.sum()
        assert_close(weights, shares / shares.sum() * 2.0 / average)


def test_encodec_gives_each_loss_its_share_of_the_gradient():
    rule = Encodec({"depth": 1.0, "segment": 2.0, "normal": 1.0})
    measured = stats([1.0] * 3, [1e-9, 5.0, 1e7])
    weights, _ = rule.update(measured, rule.init(TASKS, CPU))
    assert_close(weights * measured.grad_norms, torch.tensor([0.25, 0.5, 0.25]).double())


def test_encodec_shares_are_those_of_the_tasks_present():
    rule = Encodec([1.0, 2.0, 1.0])
    measured = stats([1.0] * 3, [1.0, 0.0, 1.0], (True, False, True))
    weights, _ = rule.update(measured, rule.init(TASKS, CPU))
    assert weights[[0, 2]].tolist() == [0.5, 0.5]


def test_encodec_of_a_zero_gradient_counts_with_the_largest_average():
    rule = Encodec()
    weights, _ = rule.update(stats([1.0] * 3, [2.0, 0.0, 1.0]), rule.init(TASKS, CPU))
    assert_close(weights * 3, torch.tensor([0.5, 0.5, 1.0]).double())
    weights, _ = rule.update(stats([1.0] * 3, [0.0] * 3), rule.init(TASKS, CPU))
    assert_close(weights * 3, torch.ones(3).double())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradNorm(alpha=-1.0), r"GradNorm: alpha must be finite and non-negative, got -1\.0"),
        (lambda: GradNorm(lr=0.0), r"GradNorm: lr must be finite and positive, got 0\.0"),
        (lambda: NTKBalance(0.0), r"NTKBalance: power must be finite and positive, got 0\.0"),
        (lambda: Encodec([1.0, 0.0]), r"Encodec: weights must be finite and positive, got \[1\.0, 0\.0\]"),
        (lambda: Encodec(total_norm=0.0), "Encodec: total_norm must be finite and positive"),
        (lambda: Encodec(decay=1.0), r"Encodec: decay must be in \[0, 1\), got 1\.0"),
        (lambda: Encodec({"a": 1.0}).init(TASKS, CPU), "Encodec: weights must give one value for each task"),
    ],
)
def test_bad_values_are_refused_by_name_and_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()

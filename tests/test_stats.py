"""Statistics add, and give what one process would have measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtl_dist.stats import LocalStats, StepReport, TaskStats, global_stats

CPU = torch.device("cpu")


def local(losses: Tensor, counts: Tensor, rows: Tensor) -> LocalStats:
    """A rank's statistics from local means: losses `[n]`, counts `[n]`, gradients `[n, d]`."""
    weighted = counts[:, None] * rows
    return LocalStats(counts * losses, counts, weighted @ weighted.T)


def test_sum_over_ranks_is_the_concatenated_batch() -> None:
    torch.manual_seed(0)
    samples = torch.rand(10, 3, dtype=torch.float64)  # loss of each sample for each task
    features = torch.randn(10, 3, 4, dtype=torch.float64)  # its gradient at the sample's features
    total = LocalStats.zeros(3, CPU)
    for rows in torch.arange(10).split([1, 6, 3]):
        c = torch.full((3,), float(len(rows)), dtype=torch.float64)
        gradient = (features[rows] / len(rows)).transpose(0, 1)  # of the local mean
        total = total + local(samples[rows].mean(0), c, gradient.flatten(1))
    stats = global_stats(total, 5, with_gram=True)
    whole = (features / 10).transpose(0, 1).flatten(1)
    torch.testing.assert_close(stats.losses, samples.mean(0))
    torch.testing.assert_close(stats.gram, whole @ whole.T)
    torch.testing.assert_close(stats.grad_norms, whole.norm(dim=1))
    assert stats.present.all()
    assert stats.step == 5


def test_absent_task_is_neutral() -> None:
    zeros = LocalStats.zeros(2, CPU)
    present = LocalStats(
        torch.tensor([6.0, 0.0]), torch.tensor([3.0, 0.0]), torch.diag(torch.tensor([9.0, 0.0]))
    )
    stats = global_stats(zeros + present, 0, with_gram=True)
    assert stats.present.tolist() == [True, False]
    assert stats.losses.tolist() == [2.0, 1.0]
    assert stats.gram.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert stats.num_present == 1


def test_no_task_at_all_divides_by_nothing() -> None:
    stats = global_stats(LocalStats.zeros(2, CPU), 0, with_gram=True)
    assert stats.losses.isfinite().all()
    assert stats.gram.isfinite().all()
    assert stats.num_present == 1


def test_guarded_statistics_are_finite() -> None:
    nan = torch.tensor([torch.nan, 1.0])
    stats = TaskStats(nan, torch.tensor([True, True]), torch.full((2, 2), torch.inf), torch.ones(2))
    guarded = stats.guarded(torch.tensor(True))
    assert guarded.losses.tolist() == [1.0, 1.0]
    assert torch.equal(guarded.gram, torch.eye(2))
    same = stats.guarded(torch.tensor(False))
    assert same.losses.isnan().tolist() == [True, False]


def test_gram_asked_for_and_not_measured_says_what_to_call() -> None:
    stats = TaskStats(torch.ones(1), torch.ones(1, dtype=torch.bool), None, torch.ones(1))
    with pytest.raises(ValueError, match=r"call `balancer\(features, heads\)`"):
        stats.require_gram()


def report(gram: Tensor | None) -> StepReport:
    present = torch.tensor([True, True, False])
    stats = TaskStats(torch.tensor([2.0, 3.0, 1.0]), present, gram, torch.ones(3), step=4)
    return StepReport(("a", "b", "c"), stats, torch.tensor([0.25, 0.75, 0.0]), torch.tensor(False))


def test_report_names_everything() -> None:
    read = report(torch.tensor([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 0.0]]))
    assert read.step == 4
    assert read.weights == {"a": 0.25, "b": 0.75, "c": 0.0}
    assert read.losses == {"a": 2.0, "b": 3.0, "c": pytest.approx(float("nan"), nan_ok=True)}
    assert read.grad_norms == {"a": 2.0, "b": 3.0, "c": pytest.approx(float("nan"), nan_ok=True)}
    torch.testing.assert_close(read.cosines[:2, :2], torch.tensor([[1.0, -0.5], [-0.5, 1.0]]))
    assert read.cosines[2].isnan().all()


def test_report_without_gradients() -> None:
    assert report(None).grad_norms == {}
    assert report(None).cosines is None

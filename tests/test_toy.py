"""The published pattern of the toy problem, from a fourteenth of its steps at fourteen times its rate."""

from __future__ import annotations

import pytest
import torch

from benchmarks.toy import SCALE, STARTS, all_rules, descend, losses_and_gradients, objectives, reached


@pytest.fixture(scope="module")
def ends():
    names = ("equal", "cagrad", "mgda", "imtlg", "nash_mtl", "famo")
    rules = all_rules()
    paths = descend({name: rules[name] for name in names}, steps=2500, lr=1.4e-2)
    return {name: path[-1] for name, path in paths.items()}


@pytest.mark.parametrize("name", ["mgda", "imtlg", "nash_mtl", "famo"])
def test_reaches_the_front_from_every_start(ends, name):
    assert reached(ends[name]).all(), ends[name]


@pytest.mark.parametrize("name", ["equal", "cagrad"])
def test_is_stuck_from_one_start_and_reaches_the_front_from_the_others(ends, name):
    stuck = STARTS.index((9.0, 9.0))
    assert reached(ends[name]).tolist() == [i != stuck for i in range(len(STARTS))]
    assert ends[name][stuck, 1] > 0  # still on the upper side, where it started


def test_problem_is_the_published_one():
    """Values worked out by hand: on the upper side only f counts, on the lower only the squares."""
    low = objectives(torch.tensor([7.0, -8.3552], dtype=torch.float64))
    # c2 = tanh(4.1776), f1sq = 0.1 (0.3552)²/10 - 20, f2sq = (14² + 0.1 (0.3552)²)/10 - 20
    c2 = torch.tanh(torch.tensor(4.1776, dtype=torch.float64))
    small = 0.1 * 0.3552**2
    expected = torch.stack([SCALE * c2 * (small / 10 - 20), c2 * ((196 + small) / 10 - 20)])
    torch.testing.assert_close(low, expected)
    origin = objectives(torch.tensor([0.0, 0.0], dtype=torch.float64))
    assert (origin == 0).all()  # c1 = c2 = 0
    losses, gradients = losses_and_gradients(torch.tensor([[-8.5, 7.5], [9.0, -1.0]], dtype=torch.float64))
    step = torch.tensor([[1e-6, 0.0]], dtype=torch.float64)
    rise = (objectives(torch.tensor([[-8.5, 7.5], [9.0, -1.0]], dtype=torch.float64) + step) - losses) / 1e-6
    torch.testing.assert_close(rise, gradients[:, :, 0], rtol=1e-4, atol=1e-6)

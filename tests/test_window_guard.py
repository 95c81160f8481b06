"""Loops that step the optimizer inside a window are noticed; all others are left alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mtl_dist import Balancer
from mtl_dist.weighting import Equal
from tests.faults.small import batch, net


@pytest.mark.parametrize(
    ("window", "calls", "refused"),
    [
        (2, [2, 2, 2, 2], False),
        (2, [1, 1, 1, 1], False),  # one task per batch
        (4, [2, 2, 2, 2], False),
        (4, [2, 4, 2], False),  # the scaler skipped one
        (2, [4, 2, 4], False),
        (2, [2, 2, 1], True),
        (3, [2, 2], True),
        (2, [3], True),
    ],
)
def test_a_loop_that_steps_inside_a_window_is_refused(window: int, calls: list[int], refused: bool) -> None:
    model, critic = copy.deepcopy(net(window=window)), nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    of_critic = torch.optim.SGD(critic.parameters(), 0.1)

    def loop() -> None:
        for number in calls:
            for _ in range(number):
                model(batch()).backward()
                critic(batch()).mean().backward()
                of_critic.step()
            optimizer.step()

    if refused:
        with pytest.raises(RuntimeError, match="the optimizer stepped inside a window"):
            loop()
    else:
        loop()


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_losses_without_a_graph_have_no_optimizer_to_follow() -> None:
    balancer = Balancer(["a"], Equal(), window=2)
    for _ in range(4):
        balancer({"a": torch.ones(())})
    assert balancer.step == 2

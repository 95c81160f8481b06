"""Arguments of the wrong kind, to the balancer and its calls: a sentence says which, and what to give."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mtl_dist import Balancer, EvaluationSums
from mtl_dist.priors import Binary
from mtl_dist.weighting import MGDA, Equal, InverseGradNorm, InverseLoss
from tests.faults.small import TASKS, batch, net


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (TASKS, {"group": 5}, r"group= must be a process group.*got 5: give the one of the ranks that hold"),
        (TASKS, {"group": [0, 1]}, r"group= must be a process group.*got \[0, 1\]"),
        ({"a", "b"}, {}, "tasks is a set, which has another order in every process"),
        (None, {}, "tasks must be a sequence of names, got None"),
        (
            TASKS,
            {"probe": "feature"},
            r"probe must be a probe of mtl_dist, such as FeatureProbe\(\).*'feature'",
        ),
        (TASKS, {"lag": 1.0}, "lag must be 0 or 1"),
        (TASKS, {"ignore": 5}, "ignore= must hold names, got 5"),
        (TASKS, {"base": [1, 2]}, r"base= must be a mapping from task to weight, got \[1, 2\]"),
        (TASKS, {"base": {"a": "1", "b": 2}}, "base= must hold finite numbers > 0"),
    ],
)
def test_settings_of_the_balancer(tasks: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Balancer(tasks, Equal(), **settings)


def test_what_is_no_group_is_told_without_other_ranks() -> None:
    for asked in (
        lambda: Balancer(TASKS, Equal()).set_group(5),
        lambda: EvaluationSums(TASKS, 5).losses(),
        lambda: Binary().synchronize(5),
    ):
        with pytest.raises(ValueError, match=r"group= must be a process group.*got 5"):
            asked()
    left_out = dist.GroupMember.NON_GROUP_MEMBER  # by `new_group`
    Balancer(TASKS, Equal(), group=left_out)
    with pytest.raises(RuntimeError, match="no process group that this rank is a member of, got -100"):
        Binary().synchronize(left_out)


@pytest.mark.parametrize("rule", [None, "mgda", 5, nn.Linear(1, 1)])
def test_what_is_no_rule(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"weighting must be a rule of mtl_dist, such as MGDA\(\)"):
        Balancer(TASKS, rule)


@pytest.mark.parametrize("counts", [[1, 1], 5, torch.tensor([1, 1]), "ab", lambda: 1])
def test_counts_that_are_no_mapping(counts: Any) -> None:
    model = net(InverseLoss())
    with pytest.raises(TypeError, match="the count mapping must be a mapping by task name, got"):
        model.balancer(model.losses(model.trunk(batch())), counts=counts)


def test_names_of_any_kind_are_told() -> None:
    model = net(InverseLoss())
    losses = model.losses(model.trunk(batch()))
    with pytest.raises(ValueError, match=r"unknown task \['c', 1, None\] in the loss mapping"):
        model.balancer({1: losses["a"], "c": losses["b"], None: losses["a"]})
    with pytest.raises(ValueError, match="the count of task 'a' must be >= 0, got 1000"):
        model.balancer(losses, counts={"a": 10**400, "b": 1})


def test_losses_in_the_place_of_heads() -> None:
    model = net(MGDA())
    z = model.trunk(batch())
    with pytest.raises(TypeError, match=r"head of task 'a' must be a function from the features.*got Tensor"):
        model.balancer(z, model.losses(z))
    with pytest.raises(TypeError, match="layer= is the last shared layer, a module, got str"):
        model.balancer(z, model.losses, layer="trunk")


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("measured", [False, True])
def test_a_detached_loss_is_told_once(measured: bool, lag: int, caplog: pytest.LogCaptureFixture) -> None:
    model = net(InverseGradNorm() if measured else InverseLoss(), lag=lag)
    given = {"parameters": model.trunk} if measured else {}
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        for step in range(3):
            losses = model.losses(model.trunk(batch(step)))
            model.balancer({**losses, "b": losses["b"].detach()}, **given).backward()
    assert caplog.text.count("the loss of task 'b' has no graph, so it trains nothing") == 1


def test_a_zero_that_stands_for_no_sample_is_no_fault(caplog: pytest.LogCaptureFixture) -> None:
    model = net(Equal())
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        losses = model.losses(model.trunk(batch()))
        model.balancer({**losses, "b": torch.zeros(())}).backward()
        model.balancer({**losses, "b": torch.ones(())}, counts={"a": 2, "b": 0})
    assert not caplog.records


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"weights": torch.tensor([float("nan"), 1.0])}, "state 'weights' must be finite, got .*damaged"),
        ({"step": -1}, "state 'step' must be a number of steps >= 0, got -1"),
        ({"step": "1"}, "state 'step' must be a number of steps >= 0, got '1'"),
        (None, "a state is a mapping, as state_dict.. gives it, got list"),
    ],
)
def test_a_damaged_state_changes_nothing(damage: dict[str, Any] | None, message: str) -> None:
    balancer = net(Equal()).balancer
    state = balancer.state_dict()
    with pytest.raises(ValueError, match=message):
        balancer.load_state_dict([] if damage is None else {**state, **damage})
    assert torch.equal(balancer.state_dict()["weights"], state["weights"])


def test_counts_are_not_expected_where_weights_are_held() -> None:
    model = net(InverseLoss(), lag=1)
    for _ in range(2):
        with model.balancer.held():
            model.balancer.expect({"a": 1, "b": 1})
            model.balancer(model.losses(model.trunk(batch())))
    model.balancer.expect({"a": 1, "b": 1})

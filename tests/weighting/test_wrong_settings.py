"""Settings of the wrong kind: every rule takes a value, or says in a sentence which setting was wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, build

from mtl_dist import Balancer
from mtl_dist.weighting import MGDA, Combinator, Equal, Grouped

TASKS = ("task0", "task1", "task2")
WRONG: list[Any] = [
    None, "x", b"a", True, float("nan"), float("inf"), -1, 1j, 0, [], {}, [1.0, 2.0], ["task0", "other"],
    {"other": 1.0}, {1: 1.0}, {"task0": "x", "task1": 1.0, "task2": 1.0}, MGDA, str.lower,
]  # fmt: skip


def refusal(rule: Any, name: str, value: Any) -> str:
    """What is said of a value; empty if it is taken and gives weights for losses."""
    try:
        changed = dataclasses.replace(rule, **{name: value})
        balancer = Balancer(TASKS, changed)
    except ValueError as error:
        return str(error)
    assert all(torch.tensor(weight).isfinite() for weight in balancer.weights.values())
    return ""


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_setting_is_taken_or_named(subject: str) -> None:
    rule = build(subject, TASKS)
    for field in dataclasses.fields(rule):
        for value in WRONG:
            said = refusal(rule, field.name, value)
            assert not said or type(rule).__name__ in said, (field.name, value, said)


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if isinstance(build(name, TASKS), Combinator)])
def test_a_combinator_takes_rules_only(subject: str) -> None:
    rule = build(subject, TASKS)
    names = [field.name for field in dataclasses.fields(rule) if field.name in ("rule", "between")]
    assert "rule" in names
    for name in names:
        for value in (MGDA, 3, "mgda", None):
            with pytest.raises(ValueError, match=rf"{type(rule).__name__}: {name} must be a rule"):
                dataclasses.replace(rule, **{name: value})


def test_groups_are_lists_by_name() -> None:
    for groups in ([["task0"]], {"a": "task0"}, {"a": 3}, None):
        with pytest.raises(ValueError, match="Grouped: groups must be a mapping"):
            Grouped(MGDA(), Equal(), groups)

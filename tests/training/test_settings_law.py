"""Settings of the wrong kind: each door takes a value as it is written, or says which setting was wrong.

Every setting of the program and every argument of every component is tried by existing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_dist.recipes import RECIPES
from mtl_dist.tracking import TRACKERS
from mtl_dist.training.components import Component, component_value, parameters_of
from mtl_dist.training.optimizer import build_optimizer
from mtl_dist.training.settings import (
    PROBES,
    Settings,
    build_probe,
    build_recipe,
    build_rule,
    build_trackers,
    load_settings,
)
from mtl_dist.training.values import set_value
from mtl_dist.weighting import COMBINATORS, RULES, Rule

SHIPPED = Path(__file__).parents[2] / "configs" / "recipe" / "multi_digits.yaml"
WRITTEN = [
    *("null", "true", "false", "x", '"5"', '""'),
    *("-1", "0", "1.0", "1.5", "-0.5", "1e400", ".nan", "1" + 25 * "0"),
    *("[]", "[1, 2]", "[jsonl, jsonl]", "{}", "{a: 1}"),
]
NEEDED = {
    "rule": "equal",
    "between": "equal",
    "groups": {"a": ["a"]},
    "weights": {"a": 1, "b": 1},
}


def read(text: str) -> Any:
    """The value that is written so."""
    values: dict[str, Any] = {}
    set_value(values, f"key={text}")
    return values["key"]


def refusal(build: Callable[[], Any]) -> tuple[Any, str]:
    """What is built, or None and what is said."""
    try:
        return build(), ""
    except ValueError as error:
        return None, str(error)


def is_kept(given: Any, got: Any) -> bool:
    """Whether nothing was converted: a whole number may become 1.0, a list a tuple, a name a path."""
    if isinstance(got, Component):
        return is_kept(given, got.spec)
    if isinstance(got, Rule):
        return True
    if isinstance(got, Path):
        return isinstance(given, str) and str(got) == given
    if isinstance(given, list) and isinstance(got, (list, tuple)):
        return len(given) == len(got) and all(map(is_kept, given, got))
    if isinstance(given, dict) and isinstance(got, dict):
        return list(map(str, given)) == list(got) and all(map(is_kept, given.values(), got.values()))
    if isinstance(given, int) and not isinstance(given, bool) and type(got) is float:
        return float(given) == got
    return type(given) is type(got) and (given == got or given != given)


def test_values_are_read_as_yaml_1_2_reads_them() -> None:
    written = [
        "1e-4",
        "-1",
        "010",
        "1_000",
        "1:30",
        "no",
        "true",
        "~",
        "2026-11-26",
        ".inf",
        '"5"',
        "0x10",
        "1.",
    ]
    expected = [1e-4, -1, 10, 1000, "1:30", "no", True, None, "2026-11-26", math.inf, "5", "0x10", 1.0]
    assert [read(text) for text in written] == expected


@pytest.mark.parametrize("name", Settings.model_fields)
def test_a_setting_of_the_program_is_kept_or_named(name: str) -> None:
    for text in WRITTEN:
        given = read(text)
        settings, said = refusal(lambda text=text: load_settings(SHIPPED, [f"{name}={text}"]))
        if said:
            assert name in said, (text, said)
            continue
        got = getattr(settings, name)
        assert is_kept(given, got), (text, got)
        # all numbers of the program count or measure something
        assert not isinstance(got, (int, float)) or 0 <= got < math.inf, (text, got)


COMPONENTS: dict[str, tuple[Callable[[Any], Any], type]] = {
    **{name: (build_rule, cls) for name, cls in (RULES | COMBINATORS).items()},
    **{name: (build_probe, cls) for name, cls in PROBES.items()},
    **{name: (build_recipe, cls) for name, cls in RECIPES.items()},
    **{
        name: (lambda spec: build_trackers(Settings.model_construct(trackers=[spec])), cls)
        for name, cls in TRACKERS.items()
    },
    **{
        name: (lambda spec: build_optimizer(spec, [nn.Parameter(torch.zeros(1))], 1e-3, 0.0), cls)
        for name, cls in (("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD))
    },
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_an_argument_of_a_component_is_kept_or_named(name: str) -> None:
    build, cls = COMPONENTS[name]
    parameters, hints = parameters_of(cls, name)
    needed = {key: NEEDED[key] for key, p in parameters.items() if p.default is p.empty and key in NEEDED}
    for key in parameters:
        for text in WRITTEN:
            given = read(text)
            built, said = refusal(lambda key=key, given=given: build({"name": name, **needed, key: given}))
            if said:
                assert key in said, (key, text, said)
                continue
            nested = {Rule: build_rule}
            got = getattr(built, key, None)
            got = component_value(given, hints.get(key, Any), key, nested) if got is None else got
            assert is_kept(given, got), (key, text, got)

"""Components by import path: what is right is built, what is wrong is one line that says what to do."""

from __future__ import annotations

import sys

import pytest

from mtl_dist.training.components import load
from mtl_dist.training.settings import build_probe, build_recipe, build_rule, load_settings
from mtl_dist.weighting import MGDA, Smooth

MODULE = """
from dataclasses import dataclass
import torch
from mtl_dist.weighting import Combinator, Rule
from mtl_dist.tracking import Tracker

class Mine(Rule):
    def __init__(self, power: float = 1.0, anything=None, size: "torch.Size | None" = None):
        if power < 0:
            raise TypeError("power is below zero")
        self.power, self.anything, self.size = power, anything, size
    def update(self, stats, state):
        return stats.losses ** self.power, state

@dataclass(frozen=True)
class Half(Combinator):
    def update(self, stats, state):
        weights, state = self.rule.update(stats, state)
        return weights / 2, state

class Unfinished(Rule):
    pass

class Unknown(Rule):
    def __init__(self, power: "Nowhere" = 1):
        pass
    def update(self, stats, state):
        return stats.losses, state

class Counting(Tracker):
    name = "counting"
    def start(self, run): pass
    def log(self, row): pass
    def close(self, summary): pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "strangers_rules.py").write_text(MODULE)
    (tmp_path / "broken_rules.py").write_text("import a_package_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("strangers_rules", "broken_rules"):
        sys.modules.pop(name, None)


def test_a_rule_of_ones_own_and_one_around_another():
    rule = build_rule({"name": "strangers_rules:Mine", "power": 2, "anything": [1, "x"]})
    assert repr(rule) == "Mine(anything=[1, 'x'], power=2.0, size=None)"
    half = build_rule({"name": "strangers_rules:Half", "rule": {"name": "smooth", "rule": "mgda"}})
    assert half.rule == Smooth(MGDA())
    assert build_rule({"name": "clamp", "rule": "strangers_rules:Mine"}).rule == build_rule(
        "strangers_rules:Mine"
    )


def test_what_pydantic_does_not_know_is_handed_over():
    assert build_rule({"name": "strangers_rules:Mine", "anything": {"a": object}}).anything == {"a": object}


def test_a_tracker_of_ones_own(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        "{recipe: multi_digits, steps: 1, batch_size: 2, output_dir: o, "
        "trackers: ['strangers_rules:Counting']}"
    )
    assert load_settings(config).trackers == ["strangers_rules:Counting"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere_rules:Mine", "weighting.name: no module 'nowhere_rules'; put nowhere_rules.py beside"),
        ("strangers_rules.deeper:Mine", "weighting.name: no module 'strangers_rules.deeper'; put strangers"),
        ("broken_rules:Mine", "importing 'broken_rules' failed: No module named 'a_package_that_is_missing'"),
        ("strangers_rules:Mime", "'strangers_rules' has no 'Mime'; did you mean 'Mine'?"),
        (
            "strangers_rules:Other",
            "'strangers_rules:Other' must be a class derived from mtl_dist.weighting.base",
        ),
        ("strangers_rules:torch", "must be a class derived from mtl_dist.weighting.base.Rule"),
        ("strangers_rules:Unfinished", "'strangers_rules:Unfinished' must define update"),
        ("strangers_rules:Unknown", "the annotations of Unknown cannot be read: name 'Nowhere'"),
        ("strangers_rules:", "write an import path as module:Name, such as my_rules:Largest"),
        (":Mine", "write an import path as module:Name"),
        ("./rules.py:Mine", "write an import path as module:Name"),
        ("mine", "weighting.name: got 'mine'; choose one of .* or an import path module:Class"),
        ({"name": "strangers_rules:Mine", "powr": 1}, "has no such field; did you mean 'power'?"),
        ({"name": "strangers_rules:Mine", "power": "big"}, "weighting.power: Input should be a valid number"),
        ({"name": "strangers_rules:Mine", "power": -1}, "weighting: power is below zero"),
    ],
)
def test_what_is_wrong_is_one_line(spec, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        build_rule(spec)
    assert "\n" not in str(caught.value)


def test_each_kind_has_its_base():
    with pytest.raises(ValueError, match=r"probe\.name: .* derived from mtl_dist\.probes\.base\.Probe"):
        build_probe("strangers_rules:Mine")
    with pytest.raises(ValueError, match=r"recipe\.name: .* derived from mtl_dist\.recipes\._base\.Recipe"):
        build_recipe("strangers_rules:Mine")


def test_nested_names():
    assert load("collections:OrderedDict.fromkeys", "x")("ab") == {"a": None, "b": None}

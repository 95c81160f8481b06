"""Each law is worth something: a rule made to break it is caught by it, and by its message."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from mtl_dist.weighting import RULES, Needs, Rule
from mtl_dist.weighting.helpers import constant
from tests.weighting import laws
from tests.weighting.cases import zoo


class Bad(Rule):
    """Keeps every law; each test below breaks one thing."""

    def init(self, tasks, device):
        return {"count": constant(0.0, len(tasks), device)}

    def update(self, stats, state):
        count = torch.where(stats.present, state["count"] + 1, state["count"])
        return self.weights(stats, count), {"count": count}

    def weights(self, stats, count):
        return count * stats.present


class Infinite(Bad):
    def weights(self, stats, count):
        return 1 / (stats.losses - stats.losses)


class WrongShape(Bad):
    def weights(self, stats, count):
        return count.sum()[None].expand(len(count) + 1)


class Impure(Bad):
    def update(self, stats, state):
        state["count"] += 1
        return super().update(stats, state)


class ModifiesLosses(Bad):
    def weights(self, stats, count):
        return stats.losses.mul_(2) * count


class Random(Bad):
    def weights(self, stats, count):
        return torch.rand_like(count)


class HandsOutState(Bad):
    def weights(self, stats, count):
        return count


class Positional(Bad):
    def weights(self, stats, count):
        return torch.arange(1.0, len(count) + 1, dtype=torch.float64)


class AbsoluteEps(Bad):
    def weights(self, stats, count):
        return 1 / (stats.losses + 1e-8)


class CountsAbsent(Bad):
    def weights(self, stats, count):
        return torch.ones_like(count) / len(count)


class ForgetsAbsent(Bad):
    def update(self, stats, state):
        count = torch.where(stats.present, state["count"] + 1, torch.zeros_like(state["count"]))
        return torch.ones_like(count), {"count": count}


class WrongSingle(Bad):
    def weights(self, stats, count):
        return torch.full_like(count, 3.0)


class GrowingState(Bad):
    def update(self, stats, state):
        history = torch.cat([state["count"], stats.losses])
        return torch.ones_like(stats.losses), {"count": history}


class HiddenMemory(Bad):
    def init(self, tasks, device):
        object.__setattr__(self, "seen", {})
        return super().init(tasks, device)

    def weights(self, stats, count):
        if stats.step == 0:
            self.seen = {"losses": stats.losses.clone()}
        return getattr(self, "seen", {}).get("losses", torch.ones_like(count)).clone()


class AlwaysDouble(Bad):
    def weights(self, stats, count):
        return torch.ones(len(count), dtype=torch.float64)


class CoarseInFloat32(Bad):
    def weights(self, stats, count):
        return torch.where(count > 0, torch.finfo(stats.losses.dtype).eps, 0.0).to(count.dtype)


class ReadsGram(Bad):
    def weights(self, stats, count):
        return count * (2 if stats.gram is not None else 1)


class ReadsOffDiagonal(Bad):
    needs = Needs.NORMS

    def weights(self, stats, count):
        return stats.gram.abs().sum(1)


class Logarithm(Bad):
    def weights(self, stats, count):
        return stats.losses.log()


class Looks(Bad):
    def weights(self, stats, count):
        return count * 2 if bool(stats.losses[0] > 0) else count


class IndexesByMask(Bad):
    def weights(self, stats, count):
        return count * stats.losses[stats.present].sum()


BREAKS = [
    ("finite", Infinite),
    ("finite", WrongShape),
    ("pure", Impure),
    ("pure", ModifiesLosses),
    ("pure", Random),
    ("pure", HandsOutState),
    ("permutation", Positional),
    ("homogeneous", AbsoluteEps),
    ("absent", CountsAbsent),
    ("absent", ForgetsAbsent),
    ("single", WrongSingle),
    ("fixed_layout", GrowingState),
    ("resume", HiddenMemory),
    ("single_precision", AlwaysDouble),
    ("single_precision", CoarseInFloat32),
    ("needs", ReadsGram),
    ("needs", ReadsOffDiagonal),
    ("any_sign", Logarithm),
    ("no_host_wait", Looks),
    ("no_host_wait", IndexesByMask),
]


@pytest.fixture
def enrolled(monkeypatch):
    def enrol(rule):
        monkeypatch.setitem(RULES, "bad", rule)
        monkeypatch.setitem(laws.DEGREES, "bad", (-1, 0))
        monkeypatch.setitem(laws.SINGLE, "bad", lambda loss, norm: 1.0)

    return enrol


@pytest.mark.parametrize(("law", "rule"), BREAKS, ids=[f"{law}-{rule.__name__}" for law, rule in BREAKS])
def test_a_law_catches_the_rule_that_breaks_it(law, rule, enrolled):
    enrolled(rule)
    broken = 0
    for case in zoo():
        try:
            laws.LAWS[law]("bad", case)
        except AssertionError:
            broken += 1
    assert broken


def test_every_law_is_seen_to_fail():
    assert {law for law, _ in BREAKS} == set(laws.LAWS)


def test_a_good_rule_passes_where_the_bad_ones_fail(enrolled, monkeypatch):
    class Good(Bad):
        def weights(self, stats, count):
            return torch.where(stats.present, count, torch.zeros_like(count))

    enrolled(Good)
    monkeypatch.setitem(laws.DEGREES, "bad", (0, 0))
    for law in laws.LAWS.values():
        for case in zoo():
            law("bad", case)


def test_a_rule_without_example_is_told_where_to_add_one(monkeypatch):
    @dataclass(frozen=True)
    class Demanding(Bad):
        knob: float

    monkeypatch.setitem(RULES, "demanding", Demanding)
    with pytest.raises(AssertionError, match=r"demanding: .*knob.*EXAMPLES in tests/weighting/subjects\.py"):
        laws.build("demanding", ("task0",))


def test_weights_that_differ_only_along_dependent_gradients_are_the_same_update():
    case = next(case for case in zoo() if case.name == "duplicates n=3")
    stats, first, last = case.stats(), torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 0, 1.0]).double()
    laws.assert_same(first, last, stats, "duplicates")
    with pytest.raises(AssertionError):
        laws.assert_same(first, last, replace(stats, gram=torch.eye(3).double()), "independent")

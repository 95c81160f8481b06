"""Each law is worth something: a rule made to break it is caught by it, and by its message."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from mtl_dist import testing
from mtl_dist.testing import LAWS, Subject, broken_on, check_rule, zoo
from mtl_dist.testing.compare import assert_same
from mtl_dist.weighting import Equal, Fixed, Needs, Rule
from mtl_dist.weighting.helpers import constant


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
    degrees = (-1, 0)

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


class ChangesItself(Bad):
    def weights(self, stats, count):
        self.seen = stats.step
        return count


BREAKS = [
    ("value", ChangesItself),
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


@pytest.mark.parametrize(("law", "rule"), BREAKS, ids=[f"{law}-{rule.__name__}" for law, rule in BREAKS])
def test_a_law_catches_the_rule_that_breaks_it(law, rule):
    assert broken_on(law, Subject.of(rule(), one), zoo())
    with pytest.raises(
        AssertionError, match=rf"{rule.__name__}\(.*breaks \d+ of its laws:\n{law}, on the case"
    ):
        check_rule(rule(), laws=[law], single=one)


def one(loss, norm):
    return 1.0


def test_every_law_is_seen_to_fail():
    assert {law for law, _ in BREAKS} == set(LAWS)


class Good(Bad):
    degrees = (0, 0)

    def weights(self, stats, count):
        return torch.where(stats.present, count, torch.zeros_like(count))


def test_a_good_rule_passes_where_the_bad_ones_fail():
    check_rule(Good(), single=one)
    check_rule(lambda tasks: Good(), single=one)


def test_a_rule_may_break_a_law_by_its_nature_but_must_break_it():
    check_rule(Positional(), laws=["permutation"], breaks={"permutation": "it goes by position"})
    with pytest.raises(AssertionError, match=r"permutation: it keeps this law after all.*\(it goes by"):
        check_rule(Good(), laws=["permutation"], breaks={"permutation": "it goes by position"})
    with pytest.raises(ValueError, match="no law 'permutations'; the laws are value, finite, "):
        check_rule(Good(), laws=["permutations"])


def test_an_error_in_the_rule_is_no_broken_law():
    class Raises(Bad):
        breaks: ClassVar = {"finite": "it raises"}

        def update(self, stats, state):
            raise KeyError("depth")

    with pytest.raises(RuntimeError, match="raised KeyError in the law finite, on the case 'random n=1'"):
        check_rule(Raises(), laws=["finite"])
    with pytest.raises(RuntimeError, match="give check_rule a function from task names"):
        check_rule(Fixed({"depth": 1.0}))


def test_without_assertions_it_refuses():
    """As `python -O` compiles it; a process of its own would compile all of torch anew."""
    optimized = compiled_testing(optimize=1)
    with pytest.raises(RuntimeError, match="check_rule checks nothing under python -O"):
        optimized.check_rule(Equal())
    compiled_testing(optimize=0).check_rule(Equal(), laws=["finite"])


def compiled_testing(optimize: int) -> ModuleType:
    """`mtl_dist.testing`, compiled anew at this level of optimisation."""
    module = ModuleType("mtl_dist.testing")
    module.__file__, module.__path__ = testing.__file__, testing.__path__
    source = Path(testing.__file__).read_text(encoding="utf-8")
    exec(compile(source, testing.__file__, "exec", optimize=optimize), vars(module))
    return module


def test_weights_that_differ_only_along_dependent_gradients_are_the_same_update():
    case = next(case for case in zoo() if case.name == "duplicates n=3")
    stats, first, last = case.stats(), torch.tensor([1.0, 0, 0]).double(), torch.tensor([0, 0, 1.0]).double()
    assert_same(first, last, stats, "duplicates")
    with pytest.raises(AssertionError):
        assert_same(first, last, replace(stats, gram=torch.eye(3).double()), "independent")

"""Every law of `mtl_dist.testing` on every rule and every case. On what: `subjects.py`."""

from __future__ import annotations

import pkgutil
from importlib import import_module

import pytest
import torch

from mtl_dist import weighting
from mtl_dist.testing import LAWS, broken_on, zoo
from mtl_dist.testing.laws import has_degrees
from mtl_dist.weighting import COMBINATORS, RULES, Rule
from tests.weighting.subjects import EXEMPT, SINGLE, SUBJECTS, VARIANTS, WRAPPERS, breaks, build, subject

CASES = zoo()
SMALL = [case for case in CASES if case.n <= 3]
TWO = ("task0", "task1")


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_law(name: str, law: str):
    # a combinator treats tasks one by one: the large cases are for the rules themselves
    broken = broken_on(law, subject(name), SMALL if "/" in name else CASES)
    reason = breaks(name).get(law)
    if reason is None:
        assert not broken, "\n".join(f"{name} on {case}: {error}" for case, error in broken.items())
    else:
        assert broken, f"{name} keeps the law after all; remove its exemption ({reason})"


@pytest.mark.parametrize("name", [name for name in SUBJECTS if build(name, TWO).degrees is None])
def test_a_rule_without_degrees_has_none(name: str):
    """It is not its inner rule's either."""
    inner = name.partition("/")[2]
    degrees = (build(inner, TWO).degrees if inner else None) or (0, 0)
    broken = []
    for case in SMALL:
        try:
            has_degrees(subject(name), case, degrees)
        except AssertionError as error:
            broken.append(str(error))
    assert broken, f"{name} has the degrees {degrees} after all"
    assert all("should give degree" in text for text in broken)


def test_tables_name_only_what_exists():
    for law, name in EXEMPT:
        assert law in LAWS
        assert name in SUBJECTS
    assert set(SINGLE) <= set(SUBJECTS)
    assert {name.partition("(")[0] for name in VARIANTS} <= set(RULES)
    assert set(WRAPPERS) == set(COMBINATORS)
    assert {law for name in SUBJECTS for law in breaks(name)} <= set(LAWS)


def test_every_rule_of_the_package_is_in_the_list():
    """A new rule is a file, and an import in mtl_dist/weighting/__init__.py."""
    modules = pkgutil.walk_packages(weighting.__path__, "mtl_dist.weighting.")
    classes = {
        cls
        for module in modules
        for cls in vars(import_module(module.name)).values()
        if isinstance(cls, type) and issubclass(cls, Rule) and cls.name
    }
    assert classes == {*RULES.values(), *COMBINATORS.values()}
    assert all(getattr(weighting, cls.__name__) is cls for cls in classes)


def test_zoo_covers_what_it_promises():
    assert {case.n for case in CASES} == {1, 2, 3, 8, 64}
    ranks = {(case.n, int(torch.linalg.matrix_rank(case.gram, hermitian=True))) for case in CASES}
    assert {(3, 1), (3, 2), (3, 3), (8, 1), (8, 4), (64, 7)} <= ranks
    assert any((case.gram.diagonal() == 0).any() for case in CASES)
    assert any((case.gram < 0).any() for case in CASES)
    assert all(torch.equal(case.gram, case.gram.T) for case in CASES)

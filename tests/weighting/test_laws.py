"""Every law on every rule and every case. What the laws are is in `laws.py`, on what in `subjects.py`."""

from __future__ import annotations

import pytest
import torch

from mtl_dist.weighting import COMBINATORS, RULES
from tests.weighting.cases import zoo
from tests.weighting.laws import EXEMPT, LAWS
from tests.weighting.subjects import EXAMPLES, SUBJECTS, VARIANTS, WRAPPERS

CASES = zoo()
SMALL = [case for case in CASES if case.n <= 3]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", SUBJECTS)
def test_law(name: str, law: str):
    exempt = EXEMPT.get((law, name))
    broken = {}
    # a combinator treats tasks one by one: the large cases are for the rules themselves
    for case in SMALL if "/" in name else CASES:
        try:
            LAWS[law](name, case)
        except AssertionError as error:
            broken[case.name] = error
        except Exception as error:
            raise RuntimeError(f"{name} on {case.name}: {error}") from error
    if exempt is None:
        assert not broken, "\n".join(f"{name} on {case}: {error}" for case, error in broken.items())
    elif exempt.cases is None:
        assert broken, f"{name} keeps the law after all; remove its exemption ({exempt.reason})"
    else:
        assert set(broken) == set(exempt.cases), f"exempt on {exempt.cases} only ({exempt.reason})"


def test_tables_name_only_what_exists():
    for law, name in EXEMPT:
        assert law in LAWS
        assert name in SUBJECTS
    assert set(EXAMPLES) <= set(RULES)
    assert {name.partition("(")[0] for name in VARIANTS} <= set(RULES)
    assert set(WRAPPERS) <= set(COMBINATORS)


def test_zoo_covers_what_it_promises():
    assert {case.n for case in CASES} == {1, 2, 3, 8, 64}
    ranks = {(case.n, int(torch.linalg.matrix_rank(case.gram, hermitian=True))) for case in CASES}
    assert {(3, 1), (3, 2), (3, 3), (8, 1), (8, 4), (64, 7)} <= ranks
    assert any((case.gram.diagonal() == 0).any() for case in CASES)
    assert any((case.gram < 0).any() for case in CASES)
    assert all(torch.equal(case.gram, case.gram.T) for case in CASES)

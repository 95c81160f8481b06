"""Every rule has a source and a cost, and the source is the one its own file names."""

from __future__ import annotations

import inspect
import re
import sys

import pytest

from mtl_dist.weighting import COMBINATORS, RULES

ALL = {**RULES, **COMBINATORS}
WITHOUT_PAPER = {"equal", "fixed", "log_sum_exp", "token_share", *COMBINATORS}


def test_every_rule_has_one():
    assert all(rule.paper and rule.cost for rule in ALL.values())


@pytest.mark.parametrize("name", sorted(set(ALL) - WITHOUT_PAPER))
def test_the_file_names_the_same_paper(name):
    text = inspect.getdoc(ALL[name])
    paper = ALL[name].paper
    authors, *rest = paper.split(", ")
    words = [authors.split(" ")[0], *re.findall(r"\d{4}\.\d+|archives/\d+|\b\d{4}\b", " ".join(rest))]
    assert words[1:], paper
    for word in words:
        assert word in text, (name, word)


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_runs_on_the_host_says_so(name):
    """Solvers reach the host through one helper; a rule's file, or its base's, names it."""
    files = {
        sys.modules[cls.__module__]
        for cls in ALL[name].__mro__
        if cls.__module__.startswith("mtl_dist.weighting")
    }
    files = {module for module in files if not module.__name__.endswith(".base")}
    on_host = any(re.search(r"on_present\(|to_host\(|\.cpu\(\)", inspect.getsource(m)) for m in files)
    assert on_host == ("host" in ALL[name].cost)

"""Sequences that are split over ranks: losses and counts are partial sums, and Grams of features add."""

from __future__ import annotations

import context
import pytest
import torch
from compare_runs import check
from launcher import succeed


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("context") / "out.pt"
    succeed(context.__file__, 4, str(out))
    return torch.load(out)


@pytest.mark.parametrize("name", context.CASES)
def test_split_sequences_equal_one_process(trained: dict, name: str) -> None:
    check(context.train(context.CASES[name], context.Ranks(), None), trained[name])

"""A fault on one rank raises on every rank, in words, and nothing hangs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from faults import CASES
from launcher import succeed

OTHER = ("PeerFailed", r"step \d+: rank 1 failed before it had its statistics")
# case: what rank 0 raises, what rank 1 raises
EXPECTED = {
    "different_tasks": [("ValueError", r"rank 0: tasks \['a', 'b'\].*\n.*rank 1: tasks \['b', 'a'\]")] * 2,
    "different_rules": [("ValueError", r"decay=0\.9.*\n.*decay=0\.5")] * 2,
    "different_probes": [("ValueError", r"FeatureProbe.*\n.*FeatureTap")] * 2,
    "unknown_task": [OTHER, ("ValueError", r"unknown task \['c'\] in the heads")],
    "loss_of_wrong_shape": [OTHER, ("ValueError", r"task 'b' must be one .* shape \(2,\)")],
    "head_raises": [OTHER, ("KeyError", "no such label")],
    "head_raises_under_the_tap": [OTHER, ("KeyError", "no such label")],
    "features_missing": [OTHER, ("ValueError", "floating-point tensor")],
    "nan_loss": [("ValueError", r"NaN or infinite: task 'b' on rank 1\.")] * 2,
    "infinite_gradient_under_the_tap": [("ValueError", r"NaN or infinite: task 'b' on rank 1\.")] * 2,
    "negative_mean_of_positive_and_negative": [("ValueError", r"needs them > 0, got {'b': -1\.0}")] * 2,
    "positive_mean_of_positive_and_negative": [None, None],
    "group_changed_too_late": [("RuntimeError", "the group cannot change after the first step")] * 2,
    "told_again_on_one_rank": [
        ("RuntimeError", r"different calls.*\n.*rank 0: the statistics .*\n.*rank 1: the counts")
    ]
    * 2,
}


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("faults") / "raised"
    succeed("faults.py", 2, str(out), timeout=100)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_raises(raised: list[dict], case: str, rank: int) -> None:
    expected, got = EXPECTED[case][rank], raised[rank][case]
    if expected is None:
        assert got is None
    else:
        assert got is not None, "raised nothing"
        assert got[0] == expected[0], got
        assert re.search(expected[1], got[1]), got

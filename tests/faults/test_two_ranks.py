"""On two ranks: right numbers are those of one process, and a refusal on one rank raises on both."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launcher import succeed
from two_ranks import CASES

OTHER = ("PeerFailed", r"rank 1 failed before it had its statistics")
# case: the largest error, or what rank 0 and rank 1 raise
EXPECTED: dict[str, float | list[tuple[str, str]]] = {
    "derivatives": 1e-9,
    "parameters as features": 1e-6,
    "parameters at the features": [("ValueError", "features hold a parameter")] * 2,
    "empty heads": 1e-9,
    "losses alone are constants": 0.0,
    "untouched term": 1e-9,
    "negative count": [OTHER, ("ValueError", r"count of task 'b' must be >= 0, got tensor\(-4\.\)")],
    "NaN count": [OTHER, ("ValueError", r"count of task 'b' must be >= 0, got tensor\(nan\)")],
    "vector count": [
        OTHER,
        ("ValueError", r"count of task 'b' must be >= 0, got torch.int64 of shape \(2,\)"),
    ],
    "string count": [OTHER, ("ValueError", r"count of task 'b' must be >= 0, got '8'")],
    "negative mask": [OTHER, ("ValueError", r"mask= holds how much each sample counts")],
    "bypass": [OTHER, ("ValueError", "loss of task 'b' depends on the features other than through")],
    "hidden object": [OTHER, ("ValueError", "features hold a object")],
    "layer with a hook": [OTHER, ("ValueError", "not its weight times its input")],
    "derivative under the tap": [
        OTHER,
        ("ValueError", "a head takes a derivative with respect to something before"),
    ],
    "factor zero": [("ValueError", "factor 0 on a rank")] * 2,
    "exactly zero": [("ValueError", "return None for it")] * 2,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("faults") / "results"
    succeed("../faults/two_ranks.py", 2, str(out), timeout=100)
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_is_right_or_raises(results: list[dict], case: str, rank: int) -> None:
    expected, got = EXPECTED[case], results[rank][case]
    if isinstance(expected, float):
        assert isinstance(got, float), got
        assert got <= expected
    else:
        kind, message = expected[rank]
        assert got is not None, "raised nothing"
        assert got[0] == kind, got
        assert re.search(message, got[1]), got

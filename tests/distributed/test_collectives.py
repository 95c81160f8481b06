"""One small all-reduce a step, whatever the model, the batch and the rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launcher import succeed

NUM_TASKS = 3
# loss sums, triangle of the Gram, faults, counts and squares, failure, notice, codes and squares; float64
BYTES = 8 * (4 * NUM_TASKS + NUM_TASKS * (NUM_TASKS + 1) // 2 + 1 + 1 + 6)
EQUAL = ["lag, equal", "lag, equal, losses"]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict:
    out = tmp_path_factory.mktemp("collectives") / "calls.json"
    succeed("collectives.py", 2, str(out))
    return json.loads(Path(out).read_text())


@pytest.mark.parametrize(
    "case",
    ["FeatureProbe", "FeatureProbe, wide", "FeatureProbe(reevaluate)", "losses", "Every(2)", *EQUAL],
)
def test_one_all_reduce_of_fixed_size_a_step(calls: dict, case: str) -> None:
    assert calls[case] == [[["all_reduce", BYTES]]] * 4  # the ranks meet over the job's store


@pytest.mark.parametrize("case", ["FeatureTap", "FeatureTap, wide", "lag", "lag, losses"])
def test_the_tap_has_two_and_so_has_lag_with_counts(calls: dict, case: str) -> None:
    assert calls[case] == [[["all_reduce", BYTES]] * 2] * 4

"""FeatureProbe's gradient, taken in the forward, costs FSDP2 no collective."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matrix import START_LIMIT, run_script

HEAD = 4 * 40 + 40 + 40 + 1  # parameters of a wide head; three are more than the largest unit


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("units") / "found"
    done = run_script("fsdp_units.py", 2, out, timeout=START_LIMIT)
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("case", ["reshard=False width=2", "reshard=True width=2", "reshard=False width=40"])
def test_a_measured_step_gathers_what_a_plain_one_does(found: list[dict[str, Any]], case: str) -> None:
    for rank in found:
        plain, balanced = rank[case]["plain"], rank[case]["balanced"]
        assert len(plain[1]) >= 5  # the first step's are of an unsharded trunk too
        assert [sorted(step) for step in balanced] == [sorted(step) for step in plain]


def test_large_heads_are_freed_and_gathered_again(found: list[dict[str, Any]]) -> None:
    """Their memory is not kept between the probe and the backward: three gathers more."""
    for rank in found:
        case = rank["reshard=True width=40"]
        for plain, balanced in zip(case["plain"], case["balanced"], strict=True):
            assert sorted(balanced) == sorted([*plain, HEAD, HEAD, HEAD])


def test_nothing_stays_gathered_after_the_backward(found: list[dict[str, Any]]) -> None:
    assert all(case["freed"] for rank in found for name, case in rank.items() if name.startswith("reshard"))


def test_parameters_are_fresh_after_a_batch_without_backward(found: list[dict[str, Any]]) -> None:
    for rank in found:
        balanced, plain = rank["dropped"]
        # the plain model's loss is of one rank, the same on both: they read the same samples
        assert balanced == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.parametrize("missing", ["", "_groups", "_groups_of", "_size"])
def test_without_fsdps_insides_two_ranks_equal_one_process(
    found: list[dict[str, Any]], reshard: bool, missing: str
) -> None:
    """A torch that names them otherwise: the parameters are gathered once more, and all else is as it was."""
    for rank in found:
        case = rank["trained"][f"reshard={reshard} missing={missing}"]
        assert case["found"] == (not missing)
        assert max(case["weights"], case["parameters"]) <= 1e-6, case

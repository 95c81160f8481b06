"""Ranks that do not meet as they should: right, or an error in words on every rank, and never a hang."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import warm
from program import ROOT

LIMIT = 200.0
STATES = (
    "ValueError",
    r"different states of the balancer.*\n.*rank 0: step \d+, state .*\n.*rank 1: step \d+, state",
)
CALLS = ("RuntimeError", "met in different calls of the balancer")
JOIN = ("RuntimeError", r"cannot be called inside model\.join\(\)")
ABSENT = ("RuntimeError", r"waited for other ranks of the balancer, and they did not come within 5 s")


def differ(name: str) -> tuple[str, str]:
    return (
        "ValueError",
        rf"(?s)different balancers.*They differ in {name}:\n  rank 0: {name} .*\n  rank 1: {name} ",
    )


AGREE, DONE = "agree", "done"  # both ranks return the same; both return
TWO = {
    "uneven_groups": AGREE,
    "very_uneven_groups": AGREE,
    "uneven_numbers_of_balancers": AGREE,
    "own_group_and_all": [("ValueError", r"different groups.*rank \d sums over ranks \[.*\], rank \d over")]
    * 2,
    "not_a_member": [DONE, ("RuntimeError", "group= is no process group that this rank is a member of")],
    "same_ranks_in_other_words": AGREE,
    "timeout_is_inherited": AGREE,
    "dry_run": AGREE,
    "different_dry_runs": [
        ("ValueError", r"before init_process_group.*\n  rank 0: step 1, .*\n  rank 1: step 1")
    ]
    * 2,
    "dry_run_on_rank_0": [("ValueError", r"different states.*\n  rank 0: step 1, .*\n  rank 1: step 0")] * 2,
    "dry_run_in_eval_mode": AGREE,
    "job_made_anew": AGREE,
    "job_ended": [("RuntimeError", r"a torch\.distributed job that has ended")] * 2,
    "group_destroyed_before_the_first_step": [("RuntimeError", r"given as group= was destroyed")] * 2,
    "destroyed_group_kept": [("RuntimeError", r"given as group= was destroyed")] * 2,
    "group_given_anew": AGREE,
    "a_copy_meets_again": AGREE,
    "loaded_on_rank_0": [("ValueError", r"different states.*\n  rank 0: step 3, .*\n  rank 1: step 0")] * 2,
    "loaded_by_all": AGREE,
    "loaded_on_rank_0_later": [CALLS] * 2,
    "loaded_later_under_the_tap": [CALLS] * 2,
    "loaded_later_under_the_parameter_probe": [CALLS] * 2,
    "loaded_what_all_have": AGREE,
    "loaded_other_weights_at_the_same_step": [STATES] * 2,
    "loaded_and_a_peer_fails": [STATES] * 2,
    "settings: check": [differ("check")] * 2,
    "settings: on_nonfinite": [differ("on_nonfinite")] * 2,
    "settings: window": [differ("window")] * 2,
    "settings: measured for the report": [differ("measured for the report")] * 2,
    "settings: probe": [differ("probe")] * 2,
    "fixed_in_another_order": AGREE,
    "other_fixed_weights": [differ("rule")] * 2,
    "observe_fails": DONE,
    "observe_on_one_rank": [CALLS] * 2,
    "another_step": [CALLS] * 2,
    "one_call_more": [DONE, ABSENT],
    "evaluation_on_one_rank": AGREE,
    "never_comes": [
        ("RuntimeError", r"did not come to .* first training call within 5 s .*: rank 1, which has"),
        DONE,
    ],
    "stops_to_come": [ABSENT, DONE],
    "one_reduction_less": [CALLS] * 2,
    "join": [JOIN] * 2,
    "join_around_a_call_outside": [JOIN] * 2,
    "join_in_words": AGREE,
    "join_before": AGREE,
    "join_of_throwing": [("RuntimeError", "")] * 2,
}
FOUR = ["mesh", "subgroup_of_a_subgroup", "some_ranks_have_no_balancer"]


def launch(folder: Path, number: int, cases: list[str]) -> list[dict]:
    """What the ranks of `number` processes saw."""
    script, path = Path(__file__).with_name("meetings.py"), {"PYTHONPATH": str(ROOT)}
    done = warm.launch(script, number, folder, *cases, timeout=LIMIT, env=path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [json.loads((folder / f"rank.{rank}.json").read_text()) for rank in range(number)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return launch(tmp_path_factory.mktemp("meetings"), 2, list(TWO))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    return launch(tmp_path_factory.mktemp("meetings"), 4, FOUR)


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize("case", TWO)
def test_ranks_agree_or_say_why_not(two: list[dict], case: str) -> None:
    results, expected = [rank[case] for rank in two], TWO[case]
    if isinstance(expected, str):
        assert [result[0] for result in results] == ["ok", "ok"], results
        assert expected == DONE or results[0][1] == results[1][1], results
        return
    for (kind, said, _), wanted in zip(results, expected, strict=True):
        if wanted == DONE:
            assert kind == "ok", results
        else:
            assert kind == wanted[0], results
            assert re.search(wanted[1], said), results


def test_a_timeout_of_five_seconds_is_seconds(two: list[dict]) -> None:
    for case in ("never_comes", "stops_to_come", "one_call_more"):
        assert max(rank[case][2] for rank in two) < 14, [rank[case] for rank in two]


def test_the_group_has_the_timeout_of_its_parent(two: list[dict]) -> None:
    assert two[0]["timeout_is_inherited"][1] == [17, 13]


def test_a_job_made_anew_goes_on_as_if_nothing_had_been(two: list[dict]) -> None:
    assert two[0]["job_made_anew"][1][1] is True


def test_a_copy_sums_over_the_same_ranks(two: list[dict]) -> None:
    assert [world_size for world_size, _ in two[0]["a_copy_meets_again"][1]] == [2, 2, 2]


def test_an_observation_that_fails_on_one_rank_is_announced(two: list[dict]) -> None:
    (_, other, ours), (_, cause, theirs) = (rank["observe_fails"][1] for rank in two)
    assert re.match(r"PeerFailed: .*rank 1 failed", other)
    assert re.match(r"ValueError: the loss of task 'b'", cause)
    assert ours == theirs


@pytest.mark.timeout(LIMIT + 60)
def test_each_group_of_a_mesh_makes_its_own(four: list[dict]) -> None:
    results = [rank["mesh"] for rank in four]
    assert [result[0] for result in results] == ["ok"] * 4, results
    first, second, third, fourth = (result[1] for result in results)
    assert first == third
    assert second == fourth
    assert first[1] != second[1]


@pytest.mark.timeout(LIMIT + 60)
def test_a_subgroup_of_a_subgroup(four: list[dict]) -> None:
    results = [rank["subgroup_of_a_subgroup"] for rank in four]
    assert [result[0] for result in results] == ["ok"] * 4, results
    outside, first, second, third = (result[1] for result in results)
    assert outside is None
    assert first[1] == second[1] == third[1]
    assert second[2] == third[2]


@pytest.mark.timeout(LIMIT + 60)
def test_ranks_without_a_balancer_are_not_waited_for(four: list[dict]) -> None:
    results = [rank["some_ranks_have_no_balancer"] for rank in four]
    assert [result[0] for result in results] == ["ok"] * 4, results
    assert results[2][1] == results[3][1] is not None
    assert max(result[2] for result in results) < 10


@pytest.mark.timeout(LIMIT + 60)
def test_three_ranks_with_two_groups_all_hear_of_it(tmp_path: Path) -> None:
    for rank in launch(tmp_path, 3, ["group_of_two_and_all"]):
        kind, said, _ = rank["group_of_two_and_all"]
        assert kind == "ValueError", said
        assert re.search(r"different groups.*\[(0, )?1, 2\]", said), said

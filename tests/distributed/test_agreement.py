"""Ranks with other seeds and other data hold the same weights and the same state, bit for bit."""

from __future__ import annotations

import pytest
import torch
from agreement import PLANTED, STEPS, SUBJECTS
from launcher import succeed
from problem import TASKS


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    out = tmp_path_factory.mktemp("agreement") / "seen"
    succeed("agreement.py", 2, str(out), timeout=100)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name in SUBJECTS if name != PLANTED])
def test_weights_at_every_step_and_state_at_the_end(seen: list[dict], name: str) -> None:
    ours, theirs = (rank[name] for rank in seen)
    assert ours["weights"].shape == (STEPS, len(TASKS))
    unequal = (ours["weights"] != theirs["weights"]).any(1).nonzero().flatten().tolist()
    assert not unequal, f"{name}: weights differ between ranks at steps {unequal}"
    assert ours["state"].keys() == theirs["state"].keys()
    for key, value in ours["state"].items():
        other = theirs["state"][key]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f"{name}: {key} is {value} on rank 0 and {other} on rank 1"


@pytest.mark.parametrize("name", SUBJECTS)
def test_ranks_saw_other_data(seen: list[dict], name: str) -> None:
    """Without this the agreement above would say nothing."""
    ours, theirs = (rank[name]["losses"] for rank in seen)
    assert ((ours != theirs) | ((ours == 0) & (theirs == 0))).all()


def test_a_rule_with_draws_of_its_own_is_caught(seen: list[dict]) -> None:
    ours, theirs = (rank[PLANTED]["weights"] for rank in seen)
    assert (ours != theirs).any(1).all()

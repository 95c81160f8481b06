"""The judge of the clients finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.gallery.judge import PACKAGES, missing, resumes, trains_as_alone

WARNING = "nll_loss2d does not have a deterministic implementation"


def facts(*, own: float = 0.0, loss: float = 0.0, rule: float = 1.0, resumed: float = 0.0) -> dict[str, Any]:
    """Of one process, in which ways are off by these numbers."""

    def way(value: float, loss: float = 0.0) -> dict[str, Any]:
        parameters = torch.tensor([1.0, 2.0 + value], dtype=torch.float64)
        return {"parameters": parameters, "losses": [3.0, 2.0 + loss]}

    ways = {"plain": way(0.0), "own": way(own, loss), "rule": way(rule), "resumed": way(rule + resumed)}
    return {**ways, "other bits": []}


def test_what_is_right_passes() -> None:
    assert trains_as_alone(facts()) == 0
    assert trains_as_alone(facts(own=1e-6)) == pytest.approx(5e-7)
    assert resumes(facts()) == "bit for bit"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"own": 1e-5}, r"not the client's numbers: parameters differ by 5\.0e-06"),
        ({"own": float("nan")}, "parameters differ by nan"),
        ({"loss": 1e-5}, "not the client's numbers: loss 1 is 2.00001, not 2.0"),
        ({"rule": 1e-6}, "the rule changes nothing"),
    ],
)
def test_what_is_wrong_is_found(wrong: dict[str, float], said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        trains_as_alone(facts(**wrong))


def test_other_bits_need_an_operation_that_torch_names() -> None:
    found = facts(resumed=1e-7)
    with pytest.raises(AssertionError, match="resume is not bitwise"):
        resumes(found)
    found["other bits"] = [WARNING]
    assert resumes(found) == f"within 3e-08; torch says: {WARNING}"
    far = {**facts(resumed=1e-5), "other bits": [WARNING]}
    with pytest.raises(AssertionError, match=f"parameters differ by 3.3e-06, and torch says: {WARNING}"):
        resumes(far)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "mmoe", ("torch", "no_such"))
    assert missing("mmoe") == ["no_such"]

"""A checkpoint goes on bit for bit on as many ranks, and to 1e-6 on more or fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from launcher import succeed


@pytest.mark.timeout(700)
def test_another_number_of_ranks(tmp_path: Path) -> None:
    for num_processes, sources in ((1, []), (2, ["1", "2"]), (4, ["2"])):
        succeed("resume.py", num_processes, str(tmp_path), *sources, timeout=300)
    succeed("resume.py", 1, str(tmp_path), "2", timeout=300)
    one, two, four = (torch.load(tmp_path / f"{n}.pt") for n in (1, 2, 4))
    rules = [rule for source, rule in two if source is None]
    assert len(rules) == 7
    for rule in rules:
        assert torch.equal(two["2", rule], two[None, rule]), f"{rule}: not bitwise on 2 ranks"
        expected = one[None, rule]
        assert expected.std() > 0, f"{rule}: weights never change"
        for change, got in {
            "1 -> 2": two["1", rule],
            "2 -> 1": one["2", rule],
            "2 -> 4": four["2", rule],
            "2": two[None, rule],
        }.items():
            off = float((got - expected).abs().max() / expected.abs().max())
            assert off <= 1e-6, f"{rule}, {change} ranks: weights off by {off:.1e}"

"""The layer's Gram and the mixture objective on 1, 2 and 4 ranks: explicit autograd on the whole batch."""

from __future__ import annotations

import re

import pytest
import warm
from launcher import succeed


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_ranks_measure_what_one_process_would(num_processes: int) -> None:
    out = succeed("shared_layer.py", num_processes, timeout=380)
    assert f"108 comparisons on {num_processes} ranks" in out


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("family", "number"), [("torch", 10), ("deepspeed", 8)])
def test_exact_on_every_engine(family: str, number: int) -> None:
    """Ragged shards, a task absent on one rank, or one task a sample; parameters after the steps too."""
    modules = warm.DEEPSPEED if family == "deepspeed" else warm.TORCH
    out = succeed("shared_layer_engines.py", 2, family, timeout=380, modules=modules)
    lines = re.findall(r"^(.+): gram (\S+) parameters (\S+)$", out, re.MULTILINE)
    assert len({name for name, _, _ in lines}) == number, out
    wrong = [line for line in lines if not (float(line[1]) < 1e-6 and float(line[2]) < 1e-6)]
    assert not wrong

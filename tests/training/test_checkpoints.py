"""Which checkpoint a run resumes from, and which it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mtl_dist.training.checkpoints import _identity, find_checkpoint
from mtl_dist.training.settings import load_settings
from mtl_dist.training.setup import check_output

CONFIG = Path(__file__).parent.parent.parent / "configs" / "recipe" / "multi_digits.yaml"


def settings(output, *overrides):
    return load_settings(CONFIG, [f"output_dir={output}", *overrides])


def checkpoint(output, step, **changes):
    identity = _identity(settings(output))
    folder = output / "checkpoints" / f"step_{step:08d}"
    folder.mkdir(parents=True)
    (folder / "mtl_dist.json").write_text(json.dumps({"step": step, **identity, **changes}))
    return folder


def test_a_fresh_run_has_none(tmp_path):
    assert find_checkpoint(settings(tmp_path)) == (None, 0)


def test_latest_is_the_highest_whole_one(tmp_path):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000200.tmp").mkdir()  # killed while it was written
    found, step = find_checkpoint(settings(tmp_path, "resume_from=latest"))
    assert (found, step) == (tmp_path / "checkpoints" / "step_00000100", 100)


def test_a_folder_can_be_named(tmp_path):
    folder = checkpoint(tmp_path, 20)
    assert find_checkpoint(settings(tmp_path, f"resume_from={folder}")) == (folder, 20)


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'latest', but there is no checkpoint in"):
        find_checkpoint(settings(tmp_path, "resume_from=latest"))
    with pytest.raises(ValueError, match="is not a checkpoint; give a folder step_"):
        find_checkpoint(settings(tmp_path, f"resume_from={tmp_path}"))
    folder = checkpoint(tmp_path, 20)
    with pytest.raises(ValueError, match="is at step 20 of 20; increase steps"):
        find_checkpoint(settings(tmp_path, f"resume_from={folder}", "steps=20"))
    with pytest.raises(
        ValueError, match="was trained with seed=0, this run has 1; restore the setting, or start"
    ):
        find_checkpoint(settings(tmp_path, f"resume_from={folder}", "seed=1"))
    with pytest.raises(
        ValueError, match=r"was trained with weighting=InverseGradNorm\(.*\), this run has MGDA"
    ):
        find_checkpoint(settings(tmp_path, f"resume_from={folder}", "weighting=mgda"))


def test_the_same_run_may_be_written_in_another_way(tmp_path):
    checkpoint(tmp_path, 20)
    same = ("weighting=inverse_grad_norm", "probe={name: feature}")
    assert find_checkpoint(settings(tmp_path, "resume_from=latest", *same))[1] == 20


def test_an_output_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    here, there = checkpoint(own, 20), checkpoint(other, 20)
    (own / "metrics.jsonl").write_text("")
    with pytest.raises(
        ValueError, match="already has a run; choose another folder, resume_from=latest, or overwrite=true"
    ):
        check_output(settings(own))
    with pytest.raises(ValueError, match="already has a run"):
        check_output(settings(own, f"resume_from={there}"))
    check_output(settings(own, "overwrite=true"))
    check_output(settings(own, "resume_from=latest"))
    check_output(settings(own, f"resume_from={here}"))
    check_output(settings(other, f"resume_from={here}"))

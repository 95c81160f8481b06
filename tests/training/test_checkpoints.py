"""Checkpoints: whole or absent, verified, found by `resume_from`, and refused by other runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mtl_dist import durable
from mtl_dist.tracking import read_rows
from mtl_dist.training.checkpoints import (
    checkpoints_of,
    move_aside,
    remove_unfinished,
    save_checkpoint,
    space_needed,
)
from mtl_dist.training.manifest import Damaged, Manifest, digest, find_damage, read_manifest
from mtl_dist.training.resume import find_start, resume_from
from mtl_dist.training.settings import load_settings, run_identity
from mtl_dist.training.together import RunError

CONFIG = Path(__file__).parent.parent.parent / "configs" / "recipe" / "multi_digits.yaml"


def settings(output, *overrides):
    return load_settings(CONFIG, [f"output_dir={output}", *overrides])


def checkpoint(output, step, content="state", **changes):
    folder = output / "checkpoints" / f"step_{step:08d}"
    (folder / "part").mkdir(parents=True)
    (folder / "part" / "state.bin").write_text(content)
    files = {"part/state.bin": (len(content), digest(folder / "part" / "state.bin"))}
    Manifest(step, 2, "ddp", {**run_identity(settings(output)), **changes}, files).write(folder)
    return folder


class Alone:
    """What `save_checkpoint` uses of an accelerator, in one process."""

    num_processes, process_index, is_main_process, is_local_main_process = 1, 0, True, True
    distributed_type = "NO"

    class state:
        deepspeed_plugin = None

    def save_state(self, folder):
        (Path(folder) / "model.bin").write_bytes(b"model" * 100)


def found(output, *overrides):
    start = find_start(settings(output, *overrides))
    return start.checkpoint, start.done


def test_a_fresh_run_has_none(tmp_path):
    assert found(tmp_path) == (None, 0)
    assert found(tmp_path, "resume_from=auto") == (None, 0)


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_the_highest_whole_one_is_taken(tmp_path, word):
    for step in (9, 100, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step_00000200.tmp").mkdir()  # killed while it was written
    assert found(tmp_path, f"resume_from={word}") == (tmp_path / "checkpoints" / "step_00000100", 100)


def test_a_folder_can_be_named(tmp_path):
    folder = checkpoint(tmp_path, 20)
    assert found(tmp_path, f"resume_from={folder}") == (folder, 20)


@pytest.mark.parametrize("word", ["latest", "auto"])
def test_what_is_refused(tmp_path, word):
    if word == "latest":
        with pytest.raises(ValueError, match="'latest', but there is no checkpoint in"):
            found(tmp_path, "resume_from=latest")
    with pytest.raises(ValueError, match="is not a checkpoint; give a folder step_"):
        found(tmp_path, f"resume_from={tmp_path}")
    folder = checkpoint(tmp_path, 20)
    for way in (word, folder):
        with pytest.raises(ValueError, match="is at step 20 of 20; increase steps"):
            found(tmp_path, f"resume_from={way}", "steps=20")
        with pytest.raises(
            ValueError, match="was trained with seed=0, this run has 1; restore the setting, or start"
        ):
            found(tmp_path, f"resume_from={way}", "seed=1")
        with pytest.raises(
            ValueError, match=r"was trained with weighting=InverseGradNorm\(.*\), this run has MGDA"
        ):
            found(tmp_path, f"resume_from={way}", "weighting=mgda")


def test_the_same_run_may_be_written_in_another_way(tmp_path):
    checkpoint(tmp_path, 20)
    same = ("weighting=inverse_grad_norm", "probe={name: feature}")
    assert found(tmp_path, "resume_from=latest", *same)[1] == 20


def test_an_output_folder_with_a_run_is_not_overwritten_by_accident(tmp_path):
    own, other = tmp_path / "own", tmp_path / "other"
    here, there = checkpoint(own, 20), checkpoint(other, 20)
    (own / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="already has a run; choose another folder, resume_from=auto"):
        found(own)
    with pytest.raises(ValueError, match="already has a run"):
        found(own, f"resume_from={there}")
    assert found(own, "overwrite=true") == (None, 0)
    assert found(own, "resume_from=latest") == found(own, f"resume_from={here}") == (here, 20)
    with pytest.raises(ValueError, match=r"already has a run.*found step_00000020"):
        found(other, f"resume_from={here}")
    assert not find_start(settings(other / "new", f"resume_from={here}")).continues
    for word in ("auto", "latest"):
        with pytest.raises(ValueError, match=f"overwrite=true and resume_from={word}: one removes"):
            settings(own, "overwrite=true", f"resume_from={word}")


def test_a_run_without_a_checkpoint_begins_again_if_it_is_the_same(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"train/global_step": 1}\n')
    with pytest.raises(ValueError, match="has a run without a checkpoint, and does not tell its settings"):
        found(tmp_path, "resume_from=auto")
    (tmp_path / "run.json").write_text(json.dumps(run_identity(settings(tmp_path))))
    start = find_start(settings(tmp_path, "resume_from=auto"))
    assert (start.checkpoint, start.done, start.continues) == (None, 0, True)
    assert start.notes == (f"{str(tmp_path)!r} has no whole checkpoint: the run begins again",)
    with pytest.raises(ValueError, match="was trained with seed=0, this run has 3"):
        found(tmp_path, "resume_from=auto", "seed=3")


DAMAGES = {
    "an empty file": (lambda f: (f / "part/state.bin").write_text(""), "state.bin has 0 bytes instead of 5"),
    "a missing file": (lambda f: (f / "part/state.bin").unlink(), "part/state.bin is missing"),
    "no manifest": (lambda f: (f / "mtl_dist.json").unlink(), "mtl_dist.json is missing"),
    "an empty manifest": (
        lambda f: (f / "mtl_dist.json").write_text(""),
        r"mtl_dist.json is not what was written \(0 bytes\)",
    ),
    "a changed manifest": (
        lambda f: (f / "mtl_dist.json").write_text(
            (f / "mtl_dist.json").read_text().replace('"step": 40', '"step": 41')
        ),
        "mtl_dist.json is not what was written",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_auto_takes_the_one_before(tmp_path, kind):
    before, newest = checkpoint(tmp_path, 20), checkpoint(tmp_path, 40)
    damage, words = DAMAGES[kind]
    damage(newest)
    for way in ("latest", newest):
        with pytest.raises(ValueError, match=f"step_00000040' is damaged: .*{words}; copy it again, or take"):
            found(tmp_path, f"resume_from={way}")
    start = find_start(settings(tmp_path, "resume_from=auto"))
    assert (start.checkpoint, start.abandoned) == (before, (newest,))
    assert "is damaged" in start.notes[0]


def test_damage_that_keeps_the_size_is_found_by_reading(tmp_path):
    before, newest = checkpoint(tmp_path, 20), checkpoint(tmp_path, 40)
    (newest / "part/state.bin").write_bytes(bytes(5))  # what XFS leaves after a power cut
    words = find_damage(newest, read_manifest(newest), ["part/state.bin"])
    assert (
        words
        == f"the checkpoint {str(newest)!r} is damaged: part/state.bin has another content than was written"
    )
    assert find_start(settings(tmp_path, "resume_from=auto"), {newest: words}).checkpoint == before
    with pytest.raises(ValueError, match="has another content"):
        find_start(settings(tmp_path, "resume_from=latest"), {newest: words})


def test_a_checkpoint_of_another_format_says_so(tmp_path):
    folder = checkpoint(tmp_path, 20)
    (folder / "mtl_dist.json").write_text(json.dumps({"step": 20, "num_processes": 2}))
    for way in ("latest", "auto", folder):
        with pytest.raises(ValueError, match="is a checkpoint of format None, and this version"):
            found(tmp_path, f"resume_from={way}")
    (folder / "mtl_dist.json").write_text("[]")
    with pytest.raises(Damaged):
        read_manifest(folder)


def test_later_checkpoints_are_abandoned_and_latest_does_not_find_them(tmp_path):
    early, late = checkpoint(tmp_path, 20), checkpoint(tmp_path, 40)
    start = find_start(settings(tmp_path, f"resume_from={early}"))
    assert start.abandoned == (late,)
    assert "step_00000040 get the ending .abandoned" in start.notes[0]
    assert move_aside(late).name == "step_00000040.abandoned"
    assert move_aside(checkpoint(tmp_path, 40)).name == "step_00000040.abandoned-2"
    assert found(tmp_path, "resume_from=latest") == (early, 20)


def test_a_finished_run_has_nothing_to_do_under_auto(tmp_path):
    folder = checkpoint(tmp_path, 20)
    wanted = settings(tmp_path, "resume_from=auto", "steps=20")
    (tmp_path / "metrics.jsonl").write_text('{"train/global_step": 20}\n')
    start = find_start(wanted)  # killed after its last checkpoint, before its summary
    assert (start.checkpoint, start.done, start.finished) == (folder, 20, False)
    (tmp_path / "summary.json").write_text('{"steps": 20}')
    assert find_start(wanted).finished


def test_torchrun_with_restarts_goes_on_by_itself(tmp_path, monkeypatch):
    assert resume_from(settings(tmp_path)) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert resume_from(settings(tmp_path)) == "auto"
    assert resume_from(settings(tmp_path, "resume_from=latest")) == "latest"
    with pytest.raises(ValueError, match="restarts this run up to 3 times, and each start would remove"):
        resume_from(settings(tmp_path, "overwrite=true"))


def test_what_is_saved_is_listed_and_verified(tmp_path):
    (tmp_path / "tracking.json").write_text("{}")
    folder = save_checkpoint(Alone(), settings(tmp_path), 20)
    assert folder == tmp_path / "checkpoints" / "step_00000020"
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.num_processes, manifest.engine) == (20, 1, "ddp")
    assert {name: size for name, (size, _) in manifest.files.items()} == {
        "model.bin": 500,
        "tracking.json": 2,
    }
    assert find_damage(folder, manifest, manifest.files) is None


def test_only_the_last_ones_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(Alone(), settings(tmp_path, "keep_last=2"), step)
    assert [path.name for path in checkpoints_of(settings(tmp_path))] == ["step_00000020", "step_00000030"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_everything_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    flush, replace = durable.flush, Path.replace
    monkeypatch.setattr(durable, "flush", lambda path: (events.append(("flush", path)), flush(path)))
    monkeypatch.setattr(
        Path, "replace", lambda path, target: (events.append(("name", Path(target))), replace(path, target))
    )
    folder = save_checkpoint(Alone(), settings(tmp_path), 20)
    unfinished = folder.with_suffix(".tmp")
    named = events.index(("name", folder))
    for path in (unfinished / "model.bin", unfinished):
        assert ("flush", path) in events[:named], path
    assert ("flush", folder.parent) in events[named:]
    manifest = events.index(("name", unfinished / "mtl_dist.json"))
    assert events.index(("flush", unfinished / "model.bin")) < manifest < named  # the manifest comes last


def test_a_save_that_fails_leaves_no_half_of_it(tmp_path):
    class Full(Alone):
        def save_state(self, folder):
            super().save_state(folder)
            raise RuntimeError("basic_ios::clear: iostream error")  # torch's words for a full disk

    saved = save_checkpoint(Alone(), settings(tmp_path), 20)
    with pytest.raises(
        RunError, match=r"has no space left \(.* free, and a checkpoint needs [\d.]+ kB\): delete"
    ):
        save_checkpoint(Full(), settings(tmp_path), 40)
    assert list((tmp_path / "checkpoints").iterdir()) == [saved]


def test_what_kills_have_left_is_removed(tmp_path):
    folder = checkpoint(tmp_path, 20)
    shutil.copytree(folder, folder.with_suffix(".tmp"))
    shutil.copytree(folder, folder.with_suffix(".old.tmp"))
    remove_unfinished(settings(tmp_path))
    assert list((tmp_path / "checkpoints").iterdir()) == [folder]


def test_the_space_of_all_checkpoints_is_counted(tmp_path):
    every = ("steps=100", "checkpoint_every=10")
    assert space_needed(settings(tmp_path, *every), 0, 7) == 70
    assert space_needed(settings(tmp_path, *every), 95, 7) == 7
    assert space_needed(settings(tmp_path, "checkpoint_every=0"), 0, 7) == 0
    assert space_needed(settings(tmp_path, *every, "keep_last=2"), 0, 7) == 21
    checkpoint(tmp_path, 10)
    checkpoint(tmp_path, 20)
    assert space_needed(settings(tmp_path, *every, "keep_last=2"), 20, 7) == 7


def test_rows_after_a_power_cut_may_be_broken_where_they_are_written_again(tmp_path):
    from mtl_dist.tracking import JsonlWriter

    path = tmp_path / "metrics.jsonl"
    rows = "".join(f'{{"train/global_step": {step}}}\n' for step in (1, 2, 3))
    path.write_text(rows + "\0\0\0 of a block\n\0\0")
    JsonlWriter(path, after_step=2).close()
    assert [row["train/global_step"] for row in read_rows(path)] == [1, 2]
    path.write_text("broken\n" + rows)
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        JsonlWriter(path, after_step=2)

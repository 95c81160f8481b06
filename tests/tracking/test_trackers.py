"""A real run of two processes with every tracker, then resumed; each is read back with its own tools."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
from program import BIN, CONFIG, run, train
from readback import STEP, tensorboard_rows, trackio_rows, wandb_records, wandb_rows
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.tracking import read_rows
from mtl_dist.training.record import earlier_ids
from mtl_dist.training.settings import load_settings

TASKS = ("left", "right", "sum", "image")
TRACKERS = "trackers=[tensorboard, {name: trackio, project: digits}, {name: wandb, mode: offline, group: g}]"
SETTINGS = (
    "steps=6",
    "eval_every=3",
    "checkpoint_every=4",
    "weighting=mgda",
    "recipe.num_train=512",
    TRACKERS,
)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Folder of a run of 6 steps that was resumed at 4, its rows before and after, what both printed."""
    folder = tmp_path_factory.mktemp("trackers") / "digits-1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(folder.parent / "trackio"))
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        patch.delenv("WANDB_MODE", raising=False)
        texts = [train(folder, 2, *SETTINGS)]
        first = read_rows(folder / "metrics.jsonl")
        (folder / "summary.json").unlink()
        texts.append(train(folder, 2, *SETTINGS, "resume_from=latest"))
    return folder, first, read_rows(folder / "metrics.jsonl"), texts


def test_both_segments_wrote_what_they_should(resumed):
    folder, first, joined, texts = resumed
    assert [row[STEP] for row in first] == [row[STEP] for row in joined] == [1, 2, 3, 4, 5, 6]
    assert first[:4] == joined[:4]
    assert "perf/sync_ms" in joined[0]
    assert joined[0]["perf/sync_ms"] > 0  # two ranks really met
    for text in texts:
        seen = [line for line in text.splitlines() if line.startswith("see ")]
        assert f"tensorboard --logdir {folder.parent}" in seen[0]
        assert "trackio show --project digits" in seen[1]
        assert f"wandb sync {folder}/wandb/offline-run-" in seen[2]


def test_wandb_has_every_row_and_every_key(resumed):
    folder, first, joined, _ = resumed
    runs = wandb_records(folder)
    assert len(runs) == 2
    assert wandb_rows(runs[0]) == first
    assert wandb_rows(runs[1]) == joined[4:]
    # the same run, so that `wandb sync` makes one series of both
    ids = {entry["run_id"] for records in runs for entry in records["run"]}
    saved = json.loads((folder / "tracking.json").read_text())
    in_checkpoint = json.loads((folder / "checkpoints/step_00000004/tracking.json").read_text())
    assert saved == in_checkpoint
    assert ids == {saved["wandb"]}


def test_two_segments_are_one_series(resumed):
    folder, _, joined, _ = resumed
    series = {row[STEP]: row for records in wandb_records(folder) for row in wandb_rows(records)}
    assert sorted(series) == [1, 2, 3, 4, 5, 6]
    assert [series[step] for step in range(5, 7)] == joined[4:]


def test_wandb_draws_against_the_optimizer_step(resumed):
    records = wandb_records(resumed[0])[0]
    globs = [metric for metric in records["metric"] if metric.get("glob_name") == "*"]
    assert [metric["step_metric"] for metric in globs] == [STEP]
    config = records["run"][0]["config"]["update"]
    assert config["rule"] == "MGDA(normalization='none')"
    assert config["tasks"] == list(TASKS)
    assert (config["num_processes"], config["learning_rate"], config["seed"]) == (2, 0.003, 0)
    assert records["run"][0]["run_group"] == "g"
    assert records["run"][0]["display_name"] == "digits-1"


def test_wandb_closes_with_tables(resumed):
    folder, _, joined, _ = resumed
    last = wandb_records(folder)[1]["history"][-1]["item"]
    assert last[STEP] == 6
    found = {key.rsplit(".", 1)[0] for key in last if key.startswith("mtl/final/")}
    assert found == {"mtl/final/weights", "mtl/final/cosines", "mtl/final/cosine_heatmap"}
    (path, *_) = sorted(folder.glob("wandb/offline-run-*/files/media/table/mtl/final/weights_*.json"))[1:]
    table = json.loads(path.read_text())
    assert table["columns"] == ["task", "weight", "loss", "grad_norm", "contribution"]
    assert [line[0] for line in table["data"]] == list(TASKS)
    assert [line[1] for line in table["data"]] == [joined[-1][f"mtl/weight/{task}"] for task in TASKS]
    heatmap = next(iter(folder.glob("wandb/offline-run-*/files/media/html/mtl/final/*.html"))).read_text()
    assert heatmap.count("<rect") == 16


def test_tensorboard_has_every_row_once(resumed):
    folder, _, joined, _ = resumed
    found = tensorboard_rows(folder)
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    for row in joined:
        columns = {key: value for key, value in row.items() if key != STEP}
        assert found[row[STEP]] == pytest.approx(columns, rel=1e-6)  # event files hold float32


def test_tensorboard_draws_all_tasks_in_one_chart(resumed):
    events = EventAccumulator(str(resumed[0])).Reload()
    tags = events.Tags()["tensors"]
    assert "custom_scalars__config__" in tags
    (layout,) = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    assert b"mtl/weight/.*" in layout
    assert "config/text_summary" in tags


def test_trackio_has_every_row_of_one_run(resumed):
    folder, first, joined, _ = resumed
    found = trackio_rows(folder.parent / "trackio", "digits")
    assert {name for _, name, _, _ in found} == {"digits-1"}
    assert len({run_id for run_id, _, _, _ in found}) == 1
    assert Counter(step for _, _, step, _ in found) == {1: 1, 2: 1, 3: 1, 4: 1, 5: 2, 6: 2}
    expected = [{key: value for key, value in row.items() if key != STEP} for row in (*first, *joined[4:])]
    assert [columns for *_, columns in found] == expected


def test_trackio_s_own_command_reads_them(resumed):
    folder = resumed[0]
    options = ["--project", "digits", "--run", "digits-1", "--metric", "mtl/weight/sum", "--json"]
    done = run(
        BIN / "trackio", "get", "metric", *options, env={"TRACKIO_DIR": str(folder.parent / "trackio")}
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["values"]) == 8


def test_a_checkpoint_elsewhere_brings_its_name_along(resumed, tmp_path):
    shutil.copytree(resumed[0] / "checkpoints/step_00000004", tmp_path / "step_00000004")
    settings = load_settings(CONFIG, [f"output_dir={tmp_path / 'new'}"])
    assert earlier_ids(settings, tmp_path / "step_00000004")["trackio"] == "digits-1"
    assert earlier_ids(settings, tmp_path) == {}

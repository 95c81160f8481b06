"""The progress bar's text, the time of a step, the names that survive a resume."""

from __future__ import annotations

import json

import pytest
from program import CONFIG

from mtl_dist.training import record
from mtl_dist.training.record import StepClock, earlier_ids, postfix, save_ids
from mtl_dist.training.settings import build_trackers, load_settings


def row(n):
    row = {"train/loss": 12.5}
    for i in range(n):
        row |= {f"mtl/weight/task_{i}": 1 / (i + 1), f"mtl/loss/task_{i}": 10.0 * i}
    return row


def test_few_tasks_are_shown_in_full():
    tasks = [f"task_{i}" for i in range(4)]
    assert postfix(row(3), tasks) == "task_0 1×0 task_1 0.5×10 task_2 0.333×20"  # the fourth was absent
    assert postfix(None, tasks) == ""


def test_many_tasks_are_summed_up():
    text = postfix(row(50), [f"task_{i}" for i in range(50)])
    assert text == "loss 12.5, 50 tasks, weights 0.02 (task_49) to 1 (task_0)"


def test_long_names_are_shortened():
    name = "a_very_long_name_of_a_task"
    assert postfix({"train/loss": 1.0, f"mtl/weight/{name}": 1.0, f"mtl/loss/{name}": 2.0}, [name]) == (
        "a_very_.._a_task 1×2"
    )


def test_a_step_s_time_leaves_validation_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "perf_counter", lambda: now[0])
    clock = StepClock()
    for _ in range(4):
        now[0] += 0.5
        clock.tick()
    with clock.stopped():
        now[0] += 60
    assert clock.lap() == 500
    now[0] += 2
    clock.tick()
    assert clock.lap() == 2000


def test_names_of_a_run_survive(tmp_path):
    settings = load_settings(CONFIG, [f"output_dir={tmp_path}"])
    checkpoint = tmp_path / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    assert earlier_ids(settings, checkpoint) == {}
    (checkpoint / "tracking.json").write_text(json.dumps({"wandb": "old"}))
    assert earlier_ids(settings, checkpoint) == {"wandb": "old"}
    save_ids(settings, {"wandb": "abc", "trackio": "x"})
    save_ids(settings, {"trackio": "x"})  # W&B could not be reached this time
    save_ids(settings, {})
    assert earlier_ids(settings, checkpoint) == {"wandb": "abc", "trackio": "x"}


def test_rows_are_always_kept():
    names = [tracker.name for tracker in build_trackers(load_settings(CONFIG, ["trackers=[tensorboard]"]))]
    assert names == ["jsonl", "tensorboard"]
    assert [tracker.name for tracker in build_trackers(load_settings(CONFIG, ["trackers=[]"]))] == ["jsonl"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trackers=[wandbb]", r"trackers\[0\]\.name: got 'wandbb'; did you mean 'wandb'\?"),
        ("trackers=[jsonl, {name: wandb, mode: off}]", r"trackers\[1\]\.mode: .*got 'off'"),
        ("trackers=[{name: wandb, entitty: x}]", r"'wandb' has no such field; did you mean 'entity'\?"),
        ("trackers=[tensorboard, tensorboard]", "give each tracker once"),
        ("log_every=0", "log_every: Input should be greater than 0"),
    ],
)
def test_trackers_that_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        load_settings(CONFIG, [override])

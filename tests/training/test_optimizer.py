"""Optimizer, learning rate and the best checkpoint: as functions, and in runs of the program."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from program import CONFIG, train
from torch import nn

from mtl_dist.recipes import MultiDigits
from mtl_dist.tracking import read_rows
from mtl_dist.training.batches import StepBatches
from mtl_dist.training.best import best_step, check_metric, note_checkpoint
from mtl_dist.training.optimizer import build_optimizer, learning_rate_factor, set_learning_rate
from mtl_dist.training.settings import load_settings

SMALL = (
    *("steps=8", "batch_size=32", "recipe.num_train=256", "recipe.channels=4", "recipe.features=16"),
    *("weighting=equal", "probe=null", "log_every=1", "eval_every=0", "checkpoint_every=4"),
)
FULL = (
    *SMALL,
    *("accumulation=2", "optimizer={name: sgd, momentum: 0.9}", "learning_rate=1e-3", "schedule=cosine"),
    *("warmup_steps=3", "clip_norm=0.5", "num_workers=1"),
    *("best_metric=eval/loss/sum", "keep_last=1"),
)


def parameter():
    return [nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("spec", "cls", "expected"),
    [
        ("adamw", torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.2}),
        ({"name": "sgd", "momentum": 0.9}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        ({"name": "adam", "betas": [0.5, 0.9]}, torch.optim.Adam, {"betas": (0.5, 0.9)}),
        ("torch.optim:RMSprop", torch.optim.RMSprop, {"lr": 0.1, "weight_decay": 0.2}),
    ],
)
def test_an_optimizer_by_name_or_import_path(spec, cls, expected):
    optimizer = build_optimizer(spec, parameter(), 0.1, 0.2)
    assert type(optimizer) is cls
    assert {key: optimizer.defaults[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer=adamv"], "optimizer.name: got 'adamv'; did you mean 'adam'?"),
        (["optimizer=torch:Tensor"], "must be a class derived from torch.optim.optimizer.Optimizer"),
        (["optimizer={name: sgd, momentun: 1}"], "'sgd' has no such argument; did you mean 'momentum'?"),
        (["optimizer={name: sgd, momentum: -1}"], "optimizer: Invalid momentum value: -1.0"),
        (["optimizer={name: sgd, lr: 1}"], "optimizer.lr: set learning_rate or weight_decay of the run"),
        (["optimizer=torch.optim:Rprop", "weight_decay=0.1"], "the optimizer 'torch.optim:Rprop' has none"),
        (["optimizer=3"], "optimizer: give a name, or a mapping with name and arguments; got 3"),
        (["accumulation=3"], "batch_size=128 counts the samples of an optimizer step and must be divisible"),
        (["accumulation=2", "virtual_ranks=2"], "accumulation=2 and virtual_ranks=2: give one of them"),
        (["warmup_steps=301"], "warmup_steps=301 must not exceed steps=300"),
        (["best_metric=eval/loss/summ"], "no column 'eval/loss/summ'; choose one of eval/loss/left, "),
        (["best_metric=eval/loss/sum", "checkpoint_every=0"], "set checkpoint_every"),
    ],
)
def test_what_is_wrong_is_one_line(overrides, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?").replace("(", r"\(")):
        load_settings(CONFIG, overrides)


def test_the_learning_rate_rises_and_falls():
    def factors(schedule, warmup=0):
        return [learning_rate_factor(schedule, step, 10, warmup) for step in range(10)]

    assert factors("constant") == [1.0] * 10
    assert factors("linear") == pytest.approx([1 - k / 10 for k in range(10)])
    assert factors("constant", 4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    cosine = factors("cosine", 2)
    assert cosine[2] == 1
    assert cosine[6] == pytest.approx(0.5)
    assert all(a > b for a, b in pairwise(cosine[2:]))
    assert learning_rate_factor("cosine", 10, 10, 10) == 1, "a run that is all warm-up"
    for capturable in (False, True):
        start = torch.tensor(1.0) if capturable else 1.0
        optimizer = torch.optim.AdamW(parameter(), lr=start)
        set_learning_rate(optimizer, 0.25)
        assert float(optimizer.param_groups[0]["lr"]) == 0.25


def test_micro_batches_are_parts_of_the_same_batch():
    whole, parts = StepBatches(50, 12, 3, 2, 9), StepBatches(50, 12, 3, 2, 9, parts=3)
    assert len(parts) == 3 * len(whole) == len(list(parts))
    cut = list(parts)
    assert [cut[k] + cut[k + 1] + cut[k + 2] for k in range(0, len(cut), 3)] == list(whole)
    assert parts.batch_size == 4


def test_the_best_checkpoint(tmp_path):
    def note(step, value, mode="min"):
        row = {} if value is None else {"eval/loss/sum": value}
        note_checkpoint(tmp_path, step, "eval/loss/sum", mode, row)
        (tmp_path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True, exist_ok=True)
        return best_step(tmp_path)

    assert best_step(tmp_path) is None
    assert [note(10, 3.0), note(20, 1.0), note(30, 2.0), note(40, float("nan")), note(50, None)] == [
        10,
        *[20] * 4,
    ]
    assert note(60, 1.0) == 60, "of equal ones the newest"
    assert note(20, 4.0) == 10, "a resumed run trains 20 again: what came later is not its own"
    (tmp_path / "checkpoints" / "step_00000010").rmdir()
    assert note(30, 5.0) == 20, "one that is gone cannot be the best"
    assert note(40, 6.0, "max") == 40, "another question, from the start"
    with pytest.raises(ValueError, match=r"choose one of eval/loss/left, .*, eval/image/psnr"):
        check_metric("loss", MultiDigits())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Rows and folder of a run with all of it, on one process and on two."""
    folders = {n: tmp_path_factory.mktemp(f"full_{n}") for n in (1, 2)}
    for number, folder in folders.items():
        train(folder, number, *FULL)
    return folders


def columns(folder):
    return [
        {key: value for key, value in row.items() if not key.startswith("perf/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def test_two_processes_are_one(runs):
    one, two = columns(runs[1]), columns(runs[2])
    assert [row["train/global_step"] for row in one] == list(range(1, 9))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_accumulation_is_the_whole_batch(runs, tmp_path):
    train(tmp_path, 1, *FULL, "accumulation=1")
    for a, b in zip(columns(runs[1]), columns(tmp_path), strict=True):
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


def test_clipping_and_schedule_do_something(runs, tmp_path):
    final = columns(runs[1])[-1]["train/loss"]
    for k, change in enumerate(("clip_norm=null", "schedule=constant")):
        train(tmp_path / str(k), 1, *FULL, change)
        assert columns(tmp_path / str(k))[-1]["train/loss"] != pytest.approx(final, rel=1e-4), change


def test_the_best_checkpoint_stays_and_a_resumed_run_is_the_same(runs, tmp_path):
    noted = json.loads((runs[1] / "best.json").read_text())
    assert noted["step"] == min(noted["values"], key=lambda step: noted["values"][step]) or noted["step"] == 8
    assert all("eval/loss/sum" in columns(runs[1])[step - 1] for step in (4, 8))
    train(tmp_path, 1, *FULL, "keep_last=2", "best_mode=max")
    worst = json.loads((tmp_path / "best.json").read_text())
    assert worst["step"] == 4, "the loss falls"
    first = tmp_path / "checkpoints" / "step_00000004"
    train(tmp_path / "on", 1, *FULL, f"resume_from={first}")
    assert columns(tmp_path / "on") == columns(tmp_path)[4:]
    train(tmp_path / "kept", 1, *FULL, "best_mode=max")
    kept = sorted(path.name for path in (tmp_path / "kept" / "checkpoints").iterdir())
    assert kept == ["step_00000004", "step_00000008"], "keep_last=1 keeps the best one too"
    assert [path.name for path in (runs[1] / "checkpoints").iterdir()] == ["step_00000008"]


def test_bf16_on_the_cpu(tmp_path):
    text = train(tmp_path, 1, *SMALL, "precision=bf16", "steps=2")
    assert "2 steps" in text
    assert json.loads((tmp_path / "summary.json").read_text())["engine"]["mixed_precision"] == "bf16"

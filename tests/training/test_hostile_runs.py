"""Runs of a hostile but honest user: each does what was asked for, or says in a sentence why not."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from mtl_dist.cli import main as console
from mtl_dist.tracking import read_rows
from mtl_dist.train import main
from mtl_dist.training import evaluate, storage
from tests.training.tiny import DATA, EVAL, MODEL, TRAIN, Tiny

SETTINGS = (
    'recipe={name: "tests.training.tiny:Tiny"}',
    *("weighting=mgda", "steps=4", "batch_size=16", "eval_every=0", "checkpoint_every=2", "probe=null"),
    *("learning_rate=1e-2", "optimizer=sgd"),
)
SHIPPED = Path(__file__).parents[2] / "configs" / "recipe" / "multi_digits.yaml"
Train = Callable[..., int]


@pytest.fixture(autouse=True)
def train_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Trains in this process, and returns the exit status."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def train(folder: Path, *overrides: str) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        return main([str(SHIPPED), *SETTINGS, f"output_dir={folder}", *overrides])

    yield train
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


def last(folder: Path) -> dict[str, float]:
    row = read_rows(folder / "metrics.jsonl")[-1]
    return {key: value for key, value in row.items() if not key.startswith("perf/")}


@pytest.mark.parametrize("fault", [*TRAIN, *DATA, *MODEL, *(fault for fault in EVAL if "NaN" not in fault)])
def test_a_recipe_that_breaks_its_promise_is_told(train_here: Train, tmp_path: Path, fault: str) -> None:
    part = {
        "eval": "(in eval mode|the metric 'mse')",
        "train": "in training mode",
        "data": r"data\(\)",
        "model": r"model\(\)",
    }
    with pytest.raises(ValueError, match=f"recipe: Tiny: {part[fault.partition(':')[0]]}"):
        train_here(tmp_path / "run", f"recipe.fault={json.dumps(fault)}")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("names=[loss, mse]", "two values would be in the column 'eval/loss/mse'"),
        ("metric=weight", "the metric of task 'a' is called 'weight'"),
        ('metric=""', "the metric of task 'a' is called ''"),
        ("metric=a/b", "the metric of task 'a' is called 'a/b'"),
        ("names=[左, b]", "task '左' cannot be part of a column name"),
        ('names=["ａ"]', "task 'ａ' cannot be part of a column name"),
        ("names=[]", "tasks must be a sequence of names"),
    ],
)
def test_names_that_no_row_can_have(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str, message: str
) -> None:
    assert train_here(tmp_path / "run", f"recipe.{recipe}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [1, 64])
def test_one_task_and_many(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    names = [f"task_{k}" for k in range(number)]
    assert train_here(tmp_path / "run", f"recipe.names={json.dumps(names)}") == 0
    assert all(f"\n{name} " in capsys.readouterr().out for name in names[:1])
    row = last(tmp_path / "run")
    assert sum(row[f"mtl/weight/{name}"] for name in names) == pytest.approx(1)
    assert console(["groups", str(tmp_path / "run")]) == (2 if number == 1 else 0)
    assert (tmp_path / "run" / "report.html").exists()


def test_a_rank_with_fewer_columns_meets_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a rank has no sample, its model may not know how many sums a metric has."""
    reduced = []

    class Rank:
        device, process_index, num_processes = torch.device("cpu"), 0, 1

        def reduce(self, total: torch.Tensor, reduction: str) -> torch.Tensor:
            reduced.append(total.shape)
            return total

    monkeypatch.setattr(evaluate, "everyone", lambda accelerator, mine: [mine, 5])
    recipe = Tiny()
    model = recipe.model(torch.nn.Identity())
    row = evaluate.evaluate(model, recipe.data(0)[1], recipe, Rank(), 16)
    assert reduced == [(2, 5)]
    assert row["eval/a/mse"] == row["eval/loss/a"] > 0


def test_the_summary_is_json_where_validation_is_nan(train_here: Train, tmp_path: Path) -> None:
    assert train_here(tmp_path, 'recipe.fault="eval: NaN"', "best_metric=eval/loss/a") == 0
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["tasks"]["a"]["loss"] is None


def test_what_is_not_the_run_s_stays(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of another program, and checkpoints whose metrics were moved away."""
    precious = tmp_path / "checkpoints" / "precious" / "model.pt"
    precious.parent.mkdir(parents=True)
    precious.write_text("gold")
    assert train_here(tmp_path) == 0
    assert train_here(tmp_path, "overwrite=true") == 0
    assert precious.read_text() == "gold"
    (tmp_path / "metrics.jsonl").unlink()
    for name in ("run.json", "summary.json", "report.html"):
        (tmp_path / name).unlink()
    before = sorted(tmp_path.rglob("*"))
    assert train_here(tmp_path) == 2
    (tmp_path / "checkpoints").rename(tmp_path / "moved")
    (tmp_path / "events.out.tfevents.1.other").touch()
    assert train_here(tmp_path) == 2
    assert capsys.readouterr().err.count("already has a run") == 2
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 1


def test_settings_that_a_resumed_run_may_change_take_effect(train_here: Train, tmp_path: Path) -> None:
    assert train_here(tmp_path / "a") == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    for folder, changed in (("a", "seed=0"), ("b", "weight_decay=50.0"), ("c", "learning_rate=1e-6")):
        assert train_here(tmp_path / folder, "resume_from=auto", "steps=6", changed) == 0
    rows = [last(tmp_path / folder)["train/loss"] for folder in "abc"]
    assert len(set(rows)) == 3


@pytest.mark.parametrize("damage", ["gone", "cut", "other"])
@pytest.mark.parametrize("name", ["best.json", "summary.json", "run.json", "tracking.json", "metrics.jsonl"])
def test_a_damaged_file_is_told_or_does_not_matter(
    train_here: Train,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
    finished: Path,
) -> None:
    folder, told = tmp_path / "run", {"best.json", "tracking.json", "metrics.jsonl"}
    shutil.copytree(finished, folder)
    content = {"cut": '{"metric": "ev', "other": '{"a": [1]}\n'}
    if damage == "gone":
        (folder / name).unlink(missing_ok=True)
    else:
        (folder / name).write_text(content[damage])
    assert train_here(folder, "resume_from=auto", "steps=6", "best_metric=eval/loss/a") == 0
    rows = read_rows(folder / "metrics.jsonl")
    if name == "metrics.jsonl":
        assert "metrics.jsonl ends at step 0, and step_00000004 goes on" in caplog.text
        assert [row["train/global_step"] for row in rows] == [5, 6]
    else:
        assert [row["train/global_step"] for row in rows] == [1, 2, 3, 4, 5, 6]
        assert (f"{name} is damaged" in caplog.text) == (name in told and damage != "gone")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        settings = (*SETTINGS, f"output_dir={folder}", "best_metric=eval/loss/a")
        assert main([str(SHIPPED), *settings]) == 0
    return folder


def test_rows_that_are_damaged_are_named(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(tmp_path) == 0
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("no row\n" + metrics.read_text())
    before = metrics.read_text()
    assert train_here(tmp_path, "resume_from=auto", "steps=6") == 1
    assert "metrics.jsonl:1: not JSON: 'no row'" in capsys.readouterr().err
    assert metrics.read_text() == before


def test_float16_where_there_is_none_is_refused(train_here: Train, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="precision=fp16: on the device 'cpu', Accelerate would train in float32"
    ):
        train_here(tmp_path, "precision=fp16")


def test_a_name_that_no_folder_can_have(
    train_here: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_here(tmp_path / (300 * "x")) == 2
    assert "File name too long" in capsys.readouterr().err


def test_one_run_at_a_time_writes_into_a_folder(
    train_here: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(storage.alone_in.__wrapped__, "__defaults__", (0.3,))
    with storage.alone_in(tmp_path):
        assert train_here(tmp_path) == 1
        assert f"another run is writing into {str(tmp_path)!r}" in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
    assert train_here(tmp_path) == 0


def test_a_run_waits_for_one_that_is_just_ending(tmp_path: Path) -> None:
    inside, left = ExitStack(), threading.Event()
    inside.enter_context(storage.alone_in(tmp_path))
    inside.callback(left.set)  # just before the lock is given back
    ending = threading.Timer(0.3, inside.close)
    ending.start()
    with storage.alone_in(tmp_path, 20):
        assert left.is_set()
    ending.join()

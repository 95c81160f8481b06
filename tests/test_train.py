"""The training program on real processes: W ranks are one process, and a resume is bitwise."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import warm
from accelerate.state import AcceleratorState
from program import BIN, CONFIG, run, train

from mtl_dist.tracking import read_rows
from mtl_dist.train import main
from mtl_dist.training.manifest import read_manifest

TASKS = ("left", "right", "sum", "image")
# a rule with a memory: its state is part of what must be resumed
SETTINGS = ("steps=20", "eval_every=10", "checkpoint_every=10", "weighting={name: smooth, rule: mgda}")


@pytest.fixture
def train_here(monkeypatch):
    """Trains in this process, which saves the start of another; as `program.train` on one process."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def of(folder, *overrides):
        settings = [f"output_dir={folder}", "num_processes=1", "recipe.num_validation=101", *overrides]
        assert main([str(CONFIG), *settings]) == 0

    yield of
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Output folder and printed text of an uninterrupted run of 20 steps, by number of processes."""
    runs = {}

    def of(num_processes):
        if num_processes not in runs:
            folder = tmp_path_factory.mktemp(f"finished_{num_processes}")
            runs[num_processes] = folder, train(folder, num_processes, *SETTINGS)
        return runs[num_processes]

    return of


def rows(folder):
    return [
        {k: v for k, v in row.items() if not k.startswith("perf/")}
        for row in read_rows(folder / "metrics.jsonl")
    ]


def state(checkpoint):
    """By file, size and digest: everything that the next step depends on."""
    return dict(read_manifest(checkpoint).files)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_a_run_writes(finished, num_processes):
    folder, text = finished(num_processes)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_processes"] == num_processes
    assert f"20 steps, {num_processes} process(es) on cpu" in text
    table = [line.split() for line in text.splitlines() if line.split()[:1] and line.split()[0] in TASKS]
    last = rows(folder)[-1]
    assert [line[0] for line in table] == list(TASKS)
    for task, loss, metric, value, weight, norm in table:
        recorded = summary["tasks"][task]
        assert recorded["weight"] == last[f"mtl/weight/{task}"]
        shown = (loss, value, weight, norm)
        expected = [recorded[key] for key in ("loss", metric, "weight", "grad_norm")]
        assert [float(number) for number in shown] == pytest.approx(expected, rel=1e-3)
    wrote = [line.removeprefix("wrote ") for line in text.splitlines() if line.startswith("wrote ")]
    checkpoints = ["checkpoints/step_00000010", "checkpoints/step_00000020"]
    names = ["metrics.jsonl", "summary.json", "report.html", *checkpoints]
    assert wrote == [str(folder / name) for name in names]
    assert all((folder / name).exists() for name in names)


def test_one_row_a_step_with_the_keys_of_the_contract(finished):
    folder, _ = finished(1)
    found = read_rows(folder / "metrics.jsonl")
    assert [row["train/global_step"] for row in found] == list(range(1, 21))
    kinds = ("weight", "loss", "grad_norm", "contribution")
    pairs = ("left__right", "left__sum", "left__image", "right__sum", "right__image", "sum__image")
    every_step = {
        *("train/global_step", "train/loss", "mtl/conflict_rate", "mtl/weight_entropy"),
        *("perf/step_ms", "perf/sync_ms"),
        *(f"mtl/{kind}/{task}" for kind in kinds for task in TASKS),
        *(f"mtl/cosine/{pair}" for pair in pairs),
    }
    metrics = ("eval/left/accuracy", "eval/right/accuracy", "eval/sum/mae", "eval/image/psnr")
    evaluated = every_step | {*(f"eval/loss/{task}" for task in TASKS), *metrics}
    for row in found:
        assert set(row) == (evaluated if row["train/global_step"] in (10, 20) else every_step)
        assert row["perf/step_ms"] > 0


def test_two_processes_are_one_on_the_same_global_batches(finished):
    one, two = rows(finished(1)[0]), rows(finished(2)[0])
    assert rows(finished(1)[0])[0]["mtl/loss/sum"] > 10  # not a comparison of nothing with nothing
    for a, b in zip(one, two, strict=True):
        # fp32 sums in another order, amplified over the steps
        assert a == pytest.approx(b, rel=2e-4, abs=2e-4), a["train/global_step"]
    # the first step comes before any drift
    assert one[0] == pytest.approx(two[0], rel=1e-5, abs=1e-6)
    # 101 validation samples do not divide by two: a mean of means would be seen here
    assert one[-1]["eval/left/accuracy"] * 101 == pytest.approx(round(one[-1]["eval/left/accuracy"] * 101))
    assert two[-1]["eval/left/accuracy"] * 101 == pytest.approx(round(two[-1]["eval/left/accuracy"] * 101))


@pytest.mark.parametrize("num_processes", [1, 2])
def test_resuming_at_10_of_20_is_bitwise_the_uninterrupted_run(finished, tmp_path, num_processes):
    expected, _ = finished(num_processes)
    folder = tmp_path / "resumed"
    # as a run killed after step 13: later rows, a torn row and an unfinished checkpoint are there
    shutil.copytree(expected, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000020")
    (folder / "summary.json").unlink()
    (folder / "checkpoints" / "step_00000020.tmp").mkdir()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:13]) + lines[13][:40])

    train(folder, num_processes, *SETTINGS, "resume_from=latest")

    assert rows(folder) == rows(expected)
    final = "checkpoints/step_00000020"
    assert state(folder / final) == state(expected / final)
    assert not (folder / f"{final}.tmp").exists()
    tasks = [json.loads((path / "summary.json").read_text())["tasks"] for path in (folder, expected)]
    assert tasks[0] == tasks[1]


def test_a_checkpoint_of_another_folder_continues_in_a_new_one(finished, train_here, tmp_path):
    expected, _ = finished(1)
    train_here(tmp_path, *SETTINGS, f"resume_from={expected / 'checkpoints/step_00000010'}")
    assert rows(tmp_path) == rows(expected)[10:]


def test_the_resume_comparison_can_fail(finished, train_here, tmp_path):
    expected, _ = finished(1)
    train_here(tmp_path, *SETTINGS, "seed=1")
    assert rows(tmp_path) != rows(expected)
    final = "checkpoints/step_00000020"
    assert state(tmp_path / final) != state(expected / final)


@pytest.mark.long
def test_a_resume_on_four_ranks_is_bitwise_too(tmp_path):
    """Where three ranks or more are added, DDP's buckets decide the order."""
    few = ("steps=4", "checkpoint_every=2", "recipe.num_train=256", "batch_size=32")
    train(tmp_path / "whole", 4, *few)
    source = tmp_path / "whole" / "checkpoints" / "step_00000002"
    train(tmp_path / "resumed", 4, *few, f"resume_from={source}")
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")[2:]
    final = "checkpoints/step_00000004"
    assert state(tmp_path / "resumed" / final) == state(tmp_path / "whole" / final)


@pytest.mark.parametrize("num_processes", [1, pytest.param(4, marks=pytest.mark.long)])
def test_another_number_of_ranks_goes_on(finished, tmp_path, num_processes):
    """Checkpoints of DDP do not depend on the number of ranks: a job goes on with what is left."""
    expected, _ = finished(2)
    source = expected / "checkpoints" / "step_00000010"
    train(tmp_path, num_processes, *SETTINGS, f"resume_from={source}")
    for a, b in zip(rows(tmp_path), rows(expected)[10:], strict=True):
        assert a == pytest.approx(b, rel=2e-3, abs=2e-3), a["train/global_step"]


def test_the_tap_reports_the_step_it_weighted(train_here, tmp_path):
    train_here(tmp_path, "steps=3", "weighting=mgda", "probe=tap")
    assert [row["train/global_step"] for row in rows(tmp_path)] == [1, 2, 3]
    assert all(row["mtl/grad_norm/sum"] > 0 for row in rows(tmp_path))


def test_without_gradients_the_table_has_none(train_here, tmp_path, capsys):
    train_here(tmp_path, "steps=3", "weighting=inverse_loss", "probe=null")
    assert "mtl/grad_norm/sum" not in rows(tmp_path)[-1]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines if line.startswith(TASKS)] == ["-"] * 4


def test_a_launch_that_fell_back_to_one_process_is_refused(tmp_path):
    launch = [BIN / "accelerate", "launch", "--cpu", "--num_processes", "2"]
    program = ["-m", "mtl_dist.train", CONFIG, f"output_dir={tmp_path}", "steps=2"]
    done = run(*launch, *program, "num_processes=2")
    assert done.returncode != 0
    assert "2 processes were asked for, but this run has 1" in done.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_batch_that_does_not_divide_is_refused(tmp_path):
    settings = [CONFIG, f"output_dir={tmp_path}", "batch_size=63"]
    done = warm.launch("mtl_dist.train", 2, *settings, modules=warm.TRAINING)
    assert done.returncode != 0
    assert "batch_size=63 is global and must be divisible by the 2 processes" in done.stderr

"""`bash launch/gpu.sh`, the proof on GPUs: its parts run on the CPU, fail where they should, and go on."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from program import ROOT, run_only

from benchmarks.gpu import clients, core, models, report, syncs
from benchmarks.gpu.__main__ import refuse_other_machine, run_part
from benchmarks.gpu.engines import ended
from benchmarks.gpu.machine import facts
from benchmarks.gpu.record import CannotRun, Record
from tests.gallery.judge import PACKAGES

CPU = torch.device("cpu")


def outcomes(record: Record) -> dict[str, str]:
    return {name: found["outcome"] for name, found in record.results.items()}


def test_the_core_checks_pass_on_a_cpu(tmp_path: Path) -> None:
    record = Record(tmp_path / "core.json")
    core.run(record, CPU, brief=True)
    skipped = {
        name: found["reason"] for name, found in record.results.items() if found["outcome"] == "skipped"
    }
    assert set(skipped) == {"memory does not grow, lag=0", "memory does not grow, lag=1"}
    assert set(outcomes(record).values()) == {"passed", "skipped"}, record.results
    assert len(record.results) >= 25
    assert json.loads((tmp_path / "core.json").read_text())["results"] == record.results


def test_a_device_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    original = core.train
    calls: list[Any] = []

    def second_is_off(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        found = original(*args, **kwargs)
        return {**found, "weights": found["weights"] * (1 + 1e-8)} if len(calls) == 2 else found

    monkeypatch.setattr(core, "train", second_is_off)
    with pytest.raises(AssertionError, match=r"weights differ by 1\.0e-08"):
        core.same_as_cpu(CPU, "mgda", None, 0)
    with pytest.raises(AssertionError, match="parameters differ by nan"):
        core.agree({"parameters": torch.ones(2)}, {"parameters": torch.tensor([1.0, math.nan])}, 1.0)


def test_reads_are_counted_for_rules_and_probes(tmp_path: Path) -> None:
    record = Record(tmp_path / "syncs.json")
    syncs.run(record, CPU, brief=True)
    assert set(outcomes(record).values()) == {"passed"}, record.results
    assert record.results["plain"]["reads"] == 0
    assert record.results["mgda, lag=0"]["reads"] > 0
    rows = report.page(tmp_path, {"gpus": [], "processor": "x", "torch": "2"}, ["syncs"], brief=True)
    assert "| 0 | plain |" in rows


def test_every_variant_of_a_small_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(models.VARIANTS, models.TORCHJD)  # seconds, in the long test
    record = Record(tmp_path / "models.json")
    models.run(record, CPU, brief=True)
    found = record.results["tiny"]["variants"]
    assert set(found) == set(models.VARIANTS)
    assert {name for name, one in found.items() if one["outcome"] != "passed"} == set()
    plain, taps = found[models.PLAIN], found["lag=1, MGDA"]
    assert plain["ratio"] == 1
    assert plain["operators"] < taps["operators"] < found[models.BACKWARDS]["operators"]
    text = report.page(tmp_path, {"gpus": [], "processor": "x", "torch": "2"}, ["models"], brief=True)
    assert text.count("\n| ") == len(models.VARIANTS) + 1


def test_clients_train_and_say_what_they_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGES, "mmoe", ("torch", "no_such_package"))
    record = Record(tmp_path / "clients.json")
    clients.run(record, CPU, brief=True)
    assert outcomes(record) == {"mmoe": "skipped", "vqgan": "passed"}, record.results
    assert record.results["mmoe"]["reason"] == "no_such_package not installed"
    page = report.page(tmp_path, {"gpus": [], "processor": "x", "torch": "2"}, ["clients"], brief=True)
    assert "| vqgan | 0.0e+00 | bit for bit | 0.0 |" in page


@pytest.mark.parametrize(
    ("said", "outcome", "reason"),
    [
        ("No module named 'torch.more'", "skipped", "torch cannot be imported"),
        (
            "No module named 'other'",
            "failed",
            "ended with 1: ...ModuleNotFoundError: No module named 'other'",
        ),
    ],
)
def test_an_import_that_fails_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, outcome: str, reason: str
) -> None:
    monkeypatch.setitem(PACKAGES, "mmoe", ("torch",))
    monkeypatch.setattr(clients, "BRIEF", ("mmoe",))
    text = f"the launch ended with 1: ...ModuleNotFoundError: {said}\n".replace("...M", "...\nM")
    monkeypatch.setattr(clients, "ended", lambda *_: text)
    record = Record(tmp_path / "clients.json")
    clients.run(record, CPU, brief=True)
    found = record.results["mmoe"]
    assert found["outcome"] == outcome
    assert reason in found["reason"].replace("\n", "")


def test_packages_of_the_callers_path_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/one:/two")
    command = [sys.executable, "-c", "import sys; print(sys.path[1:4])"]
    assert "['/zero', '/one', '/two']" in ended(command, 20, {"PYTHONPATH": "/zero"})


def test_a_record_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def breaks() -> None:
        raise RuntimeError("no")

    def cannot() -> None:
        raise CannotRun("no such thing")

    first = Record(tmp_path / "part.json")
    first.run("good", lambda: {"error": 1.0})
    first.run("bad", breaks)
    first.run("other", cannot)
    second = Record(tmp_path / "part.json")
    assert outcomes(second) == {"good": "passed", "bad": "failed", "other": "skipped"}
    assert [second.wants(name) for name in ("good", "bad", "other", "new")] == [False, True, False, True]
    second.run("bad", lambda: None)
    late = Record(tmp_path / "part.json", seconds=-1.0)
    late.run("good", breaks)
    late.run("new", lambda: None)
    assert outcomes(late) == {"good": "passed", "bad": "passed", "other": "skipped", "new": "failed"}
    assert "not reached within the time" in late.results["new"]["reason"]
    line, status = report.verdict(tmp_path, {**facts(), "torch": "2.9"}, ["part", "more"], 3.0, brief=False)
    assert (line.split(":")[0], status) == ("FAILED", 1)
    assert line.endswith("torch 2.9; not run: more")


def test_results_of_another_machine_are_not_mixed_in(tmp_path: Path) -> None:
    mine = facts()
    record = Record(tmp_path / "core.json")
    record.facts = {**mine, "torch": "2.0"}
    record.save()
    with pytest.raises(SystemExit, match=r"core.json is of another machine \(torch '2.0'"):
        refuse_other_machine(tmp_path, mine)


def test_a_part_that_dies_fails_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    options = type("Options", (), {"out": tmp_path})
    for left, reason in ((5.0, "ended with 1"), (4.0, "not reached within the time of the run")):
        run_part("core", options, left, brief=True)
        found = json.loads((tmp_path / "core.json").read_text())["results"]["the part itself"]
        assert found["outcome"] == "failed"
        assert reason in found["reason"]


def test_without_torch_one_line_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *torch*) exit 1 ;; *) exit 0 ;; esac\n')
    python.chmod(0o755)
    done = run_only("bash", ROOT / "launch/gpu.sh", timeout=20, env={"MTL_DIST_PYTHON": str(python)})
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: no Python 3.11 or newer with torch 2.9 or newer and numpy among")


@pytest.mark.long
def test_the_small_form_of_the_whole_run(tmp_path: Path) -> None:
    env = {"MTL_DIST_PYTHON": sys.executable}
    done = run_only("bash", ROOT / "launch/gpu.sh", "--brief", "--out", tmp_path, timeout=590, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("PASSED: ")
    assert ", 0 failed, in " in last
    assert "not run" not in last
    assert {path.stem for path in tmp_path.glob("*.json")} == {
        *("doctor", "core", "syncs", "matrix", "training", "clients", "overhead", "models")
    }
    text = (tmp_path / "report.md").read_text()
    assert "## matrix: 4 passed, 0 skipped, 0 failed" in text
    again = run_only("bash", ROOT / "launch/gpu.sh", "--brief", "--out", tmp_path, timeout=200, env=env)
    assert again.returncode == 0, again.stderr

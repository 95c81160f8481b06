"""`mtl-dist doctor`: sound launches pass, the known silent fallbacks fail, under real launchers."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from program import BIN, ROOT, run

from mtl_dist.doctor import trial, versions
from mtl_dist.doctor.examine import Line, examine

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
DOCTOR = ["-m", "mtl_dist.doctor"]


def verdicts(done: CompletedProcess[str]) -> dict[str, str]:
    lines = [line.split() for line in done.stdout.splitlines() if line[:4].strip() in ("ok", "warn", "FAIL")]
    return {words[1]: words[0] for words in lines}


def test_one_process_is_sound() -> None:
    done = run(BIN / "mtl-dist", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert verdicts(done) == dict.fromkeys(("versions", "launch", "training", "agreement", "sync"), "ok")
    assert done.stdout.rstrip().endswith("no failures")


@pytest.mark.timeout(200)
def test_two_processes_equal_one() -> None:
    done = run(*TORCHRUN, 2, *DOCTOR, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    found = verdicts(done)
    assert found.pop("sync") in ("ok", "warn")  # a busy machine is slow
    assert set(found.values()) == {"ok"}
    assert "2 process(es), MULTI_CPU" in done.stdout
    assert done.stdout.count("launch    ") == 1, "one process tells"


@pytest.mark.timeout(200)
def test_zero_2_equals_one_process() -> None:
    config = ROOT / "configs" / "engine" / "zero2_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    environment = {"ACCELERATE_USE_CPU": "false", "DS_ACCELERATOR": "cpu"}
    done = run(*launch, *DOCTOR, timeout=180, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 process(es), DEEPSPEED" in done.stdout
    assert verdicts(done)["training"] == "ok"


def test_the_silent_fallback_to_one_process_fails() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", 2]
    done = run(*launch, *DOCTOR)
    assert done.returncode != 0
    assert verdicts(done) == {"versions": "ok", "launch": "FAIL"}
    assert "its --cpu launcher needs MPI" in done.stdout


def test_another_number_of_processes_fails() -> None:
    done = run(BIN / "mtl-dist", "doctor", "--num-processes", 4)
    assert done.returncode == 1
    assert "4 processes were asked for, but this run has 1" in done.stdout
    assert "does not train what you asked for" in done.stdout


def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Line]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    return {line.name: line for line in examine(None)}


@pytest.mark.usefixtures("fresh_accelerate")
def test_wrong_weights_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = trial._train_alone
    monkeypatch.setattr(trial, "_train_alone", lambda size: right(size) * 1.001)
    line = examined(monkeypatch, tmp_path)["training"]
    assert line.verdict == "FAIL"
    assert "ranks do not train with the same gradients" in line.advice


@pytest.mark.usefixtures("fresh_accelerate")
def test_an_engine_that_raises_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(trial, "_train", broken)
    line = examined(monkeypatch, tmp_path)["training"]
    assert (line.verdict, line.detail) == ("FAIL", "RuntimeError: no such kernel")


def test_versions_out_of_bounds_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.version_problems() == []
    old = {"torch": "2.1.0+cu121", "deepspeed": "0.10.0", "pyyaml": None}
    installed = versions._installed
    monkeypatch.setattr(versions, "_installed", lambda name: old[name] if name in old else installed(name))
    problems = " ".join(versions.version_problems())
    assert "torch is 2.1.0+cu121, but >=2.9 is needed" in problems
    assert "deepspeed is 0.10.0" in problems
    assert "pyyaml is missing: pip install 'pyyaml>=6.0.1'" in problems


@pytest.fixture
def fresh_accelerate() -> object:
    """Accelerate keeps its state in the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

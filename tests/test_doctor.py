"""`mtl-dist doctor`: sound launches pass, the known silent fallbacks fail, under real launchers."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
import warm
from accelerate import Accelerator
from program import BIN, ROOT, run

from mtl_dist.doctor import facts, machines, trial, versions
from mtl_dist.doctor.examine import Line, add_arguments, examine
from mtl_dist.doctor.facts import Facts
from mtl_dist.integrations.accelerate import check_launch

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
    program = ROOT / "tests" / "console.py"
    done = warm.launch(program, 1, "doctor", "--num-processes", 4, modules=warm.TRAINING)
    assert done.returncode == 1
    assert "4 processes were asked for, but this run has 1" in done.stdout
    assert "does not train what you asked for" in done.stdout


def examined(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Line]:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return {line.name: line for line in examine(parser.parse_args([]))}


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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


SAME = {"versions": {"torch": "2.13.0"}, "code": "abc", "settings": "def", "processes": "4 in all"}


def met(folder: Path | None, *machine: dict[str, Any], seconds: float = 20) -> list[list[str]]:
    """What machines print that meet on this one: each is a thread."""
    head, said = f"127.0.0.1:{free_port()}", [[] for _ in machine]

    def one(place: int) -> None:
        mine = Facts(**{"host": f"node{place}", **SAME, **machine[place]})
        said[place] += map(str, machines.examine_machines(head, 2, mine, folder, seconds))

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(machine))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_equal_machines_are_fine_before_a_start(tmp_path: Path) -> None:
    first, second = met(tmp_path / "runs", {}, {})
    assert {line[:4] for line in first} == {"ok  "}
    assert sorted(first[1:]) == sorted(second[1:])
    assert [line.split()[1] for line in first] == [
        "machines",
        "code",
        "packages",
        "settings",
        "processes",
        "output",
    ]
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "change", "cure"),
    [
        ("code", {"code": "abd", "commit": "123"}, "git pull, or copy the repository"),
        (
            "packages",
            {"versions": {"torch": "2.12.0"}},
            "pip install -c constraints.txt -e . on every machine",
        ),
        ("settings", {"settings": "xyz"}, "give the same engine, CONFIG and key=value on every machine"),
        ("processes", {"processes": "8 in all"}, "set NPROC_PER_NODE to the same number on every machine"),
    ],
)
def test_what_differs_is_one_line_with_its_cure(name: str, change: dict[str, Any], cure: str) -> None:
    for said in met(None, {}, change):
        (line,) = [line for line in said if line.startswith("FAIL")]
        assert line.startswith(f"FAIL {name:<10}machines differ: node")
        assert "node0: " in line
        assert "node1: " in line
        assert f"-> {cure}" in line


def test_a_machine_that_does_not_come_is_missed() -> None:
    ((line,),) = met(None, {}, seconds=0.5)
    assert line.startswith("FAIL head      HEAD=127.0.0.1:")
    assert "1 of 2 machines came in time: node0. Start the same command on the others; 127.0.0.1 is" in line


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ("node0", "give host:port of one of the machines"),
        ("no-such-host.invalid:29500", "'no-such-host.invalid' has no address on"),
    ],
)
def test_a_wrong_head_is_one_line(head: str, words: str) -> None:
    mine = Facts("node0", {}, "abc")
    (line,) = machines.examine_machines(head, 2, mine, None, 1)
    assert line.verdict == "FAIL"
    assert words in line.advice


def test_a_port_of_another_program_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        (line,) = machines.examine_machines(f"127.0.0.1:{port}", 2, Facts("node0", {}, "abc"), None, 1)
    assert f"port {port} is used by another program on" in line.advice


def test_names_that_only_their_machine_can_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    debian = {**SAME, "address": "127.0.1.1", "choices": {"eth0": "10.0.0.2", "eth1": "10.1.0.2"}}
    told = [
        line for line in facts.compare([Facts("a", **debian, towards="10.0.0.2")]) if line.name == "interface"
    ]
    assert [str(line) for line in told] == [
        "ok   interface a: its own name is 127.0.1.1 there (/etc/hosts), which others cannot reach: "
        "GLOO_SOCKET_IFNAME=eth0 will be used"
    ]
    (line,) = [line for line in facts.compare([Facts("a", **debian)]) if line.name == "interface"]
    assert line.verdict == "FAIL"
    assert line.advice.endswith("that leads to the others: eth0 (10.0.0.2) or eth1 (10.1.0.2)")
    told = facts.compare([Facts("a", **debian, interface="eth1"), Facts("b", **SAME, address="10.0.0.3")])
    assert {line.verdict for line in told} == {"ok"}


def test_only_one_of_head_and_machines_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from mtl_dist.cli import main

    assert main(["doctor", "--machines", "2"]) == 2
    assert "give both --machines and --head" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "words"),
    [
        *(
            (f"{name} {value}", f"argument {name}: ")
            for name in ("--num-processes", "--machines", "--wait-minutes")
            for value in ("0", "-1", "nan", "inf", "x", "true")
        ),
        ("--machines 1.5", "invalid number value: '1.5'"),
        ("--engine some.yaml", "--engine and --wait-minutes go with --machines"),
        ("--wait-minutes 3", "--engine and --wait-minutes go with --machines"),
        ("--machines 2 --head node0:29500 --engine nowhere.yaml", "'nowhere.yaml' cannot be read"),
    ],
)
def test_wrong_arguments_are_named(given: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mtl_dist.cli import main

    try:
        status = main(["doctor", *given.split()])
    except SystemExit as stop:
        status = stop.code
    assert status in (1, 2)
    told = capsys.readouterr()
    assert words in told.out + told.err


@pytest.mark.parametrize("number", ["two", "-2", "0", "2.0", " ", "\u00b2"])
def test_a_wrong_number_in_the_environment_is_told(number: str, fresh_accelerate: object) -> None:
    with pytest.raises(RuntimeError, match="MTL_DIST_NUM_PROCESSES must be a number of processes >= 1, got"):
        check_launch(Accelerator(cpu=True), {"MTL_DIST_NUM_PROCESSES": number})


@pytest.fixture
def fresh_accelerate() -> object:
    """Accelerate keeps its state in the process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)

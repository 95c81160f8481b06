"""DeepSpeed's operator is compiled once; a launch that was killed meanwhile does not make later ones wait."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from program import BIN, OPERATOR, ROOT, SUPERVISED, environment, prepare_deepspeed, run

SCRIPT = ROOT / "launch" / "_deepspeed.py"
LOAD = """
from deepspeed.accelerator import get_accelerator
get_accelerator().create_op_builder("ShareMemCommBuilder").load(verbose=False)
"""


def wait_until(condition: object, limit: float = 60) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.05)


@pytest.fixture
def operator(tmp_path: Path) -> Path:
    """A folder of its own for what is compiled, as a finished set-up leaves it."""
    prepare_deepspeed()
    if not OPERATOR.exists():
        pytest.skip("no compiler")
    return Path(shutil.copytree(OPERATOR, tmp_path / "extensions" / OPERATOR.name))


@pytest.fixture
def module() -> object:
    found = importlib.util.spec_from_file_location("_deepspeed", SCRIPT)
    loaded = importlib.util.module_from_spec(found)
    found.loader.exec_module(loaded)
    return loaded


def load(operator: Path, timeout: float) -> subprocess.CompletedProcess[str]:
    """What every rank of a launch does first."""
    env = {"TORCH_EXTENSIONS_DIR": str(operator.parent), "DS_ACCELERATOR": "cpu"}
    return run(sys.executable, "-c", LOAD, env=env, timeout=timeout)


@pytest.fixture
def killed(operator: Path, tmp_path: Path) -> Path:
    """The operator after a compilation that was killed in its midst."""
    shutil.rmtree(operator)
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\ncase "$*" in *.cpp*) exec sleep 600 ;; *) exec c++ "$@" ;; esac\n')
    slow.chmod(0o755)
    # in the process group of the test, so that only the supervisor can find its compilers
    compiling = subprocess.Popen(
        [*SUPERVISED, sys.executable, SCRIPT, operator.parent], env=environment({"CXX": str(slow)})
    )
    wait_until(lambda: (operator / "build.ninja").exists())
    compiling.send_signal(signal.SIGTERM)
    compiling.wait()
    assert (operator / "lock").exists()
    return operator


def test_a_killed_compilation_does_not_hinder_the_next_launch(killed: Path) -> None:
    shutil.copytree(OPERATOR, killed, dirs_exist_ok=True)  # or the next would compile, for a minute
    done = run("bash", "-c", f'source "{ROOT}/launch/_setup.sh"; VENV="{BIN.parent}"; compile_deepspeed',
               env={"TORCH_EXTENSIONS_DIR": str(killed.parent)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("compiling an operator of DeepSpeed into ")
    assert not (killed / "lock").exists()
    assert load(killed, timeout=100).returncode == 0


def test_without_that_it_would(operator: Path) -> None:
    (operator / "lock").touch()
    with pytest.raises(AssertionError, match="hung for 6 s"):
        load(operator, timeout=6)


def test_a_stale_lock_is_removed(tmp_path: Path, module: object) -> None:
    lock = tmp_path / "lock"
    assert not module.remove_stale(lock)
    lock.touch()
    assert module.remove_stale(lock)
    assert not lock.exists()


def test_a_lock_that_is_held_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / OPERATOR.name
    folder.mkdir()
    (folder / f"{OPERATOR.name}.so").touch()
    with (folder / "lock").open("w"):
        waiting = subprocess.Popen([*SUPERVISED, sys.executable, SCRIPT, tmp_path])
        wait_until((tmp_path / "mtl_dist.lock").exists)
        time.sleep(1)
        assert waiting.poll() is None
        (folder / "lock").unlink()  # as its holder does, before it closes it or after
    assert waiting.wait(60) == 0


def test_what_is_compiled_is_left_alone(operator: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in operator.iterdir()}
    done = run("bash", "-c", f'source "{ROOT}/launch/_setup.sh"; VENV=/none; compile_deepspeed',
               env={"TORCH_EXTENSIONS_DIR": str(operator.parent)})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert load(operator, timeout=100).returncode == 0
    assert {path.name: path.stat().st_mtime_ns for path in operator.glob("*.o")} == {
        name: time for name, time in before.items() if name.endswith(".o")
    }

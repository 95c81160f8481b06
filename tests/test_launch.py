"""The scripts of launch/: help, one clear line where they cannot go on, a real training on two ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from program import ROOT, run

SCRIPTS = ("quickstart.sh", "test.sh")


@pytest.fixture
def clone(tmp_path):
    """The files that the scripts need, in a folder without an environment."""
    root = tmp_path / "clone"
    for folder in ("launch", "configs"):
        shutil.copytree(ROOT / folder, root / folder)
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, root / name)
    return root


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def only_tools(folder: Path) -> str:
    """A PATH with the shell's tools and without any Python."""
    tools = (
        "bash",
        "sh",
        "cat",
        "cksum",
        "date",
        "dirname",
        "flock",
        "grep",
        "head",
        "mkdir",
        "rm",
        "sed",
        "tail",
    )
    folder.mkdir()
    for tool in tools:
        if found := shutil.which(tool):
            (folder / tool).symlink_to(found)
    return str(folder)


def one_line(done, clone: Path) -> str:
    """The error of a script that gave up, which must be a single line."""
    assert done.returncode == 1, done
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("installing mtl-dist")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    return lines[0].replace(str(clone), "ROOT")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_needs_nothing(clone, script, option):
    done = run("bash", clone / "launch" / script, option)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: bash launch/{script}")
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_old_python_is_one_line(clone, tmp_path, script):
    path = only_tools(tmp_path / "bin")
    executable(tmp_path / "bin" / "python3", 'case "$1" in --version) echo Python 3.9.2 ;; *) exit 1 ;; esac')
    error = one_line(run("bash", clone / "launch" / script, env={"PATH": path}), clone)
    assert "Python 3.11 or newer is needed, and not found: python3 is Python 3.9.2;" in error
    assert not (clone / ".venv").exists()


def test_no_python_is_one_line(clone, tmp_path):
    error = one_line(run("bash", clone / "launch/test.sh", env={"PATH": only_tools(tmp_path / "bin")}), clone)
    assert "Python 3.11 or newer is needed, and not found: no python on PATH;" in error


def test_a_python_without_venv_is_one_line(clone, tmp_path):
    # Debian's python3 without python3-venv: the version is right, ensurepip is missing
    python = executable(tmp_path / "python", 'case "$*" in *ensurepip*) exit 1 ;; *) exit 0 ;; esac')
    error = one_line(run("bash", clone / "launch/test.sh", env={"MTL_DIST_PYTHON": str(python)}), clone)
    assert error.endswith("has no venv module; install it (Debian and Ubuntu: apt install python3-venv)")


def test_a_broken_environment_is_made_anew_and_a_missing_package_is_one_line(clone):
    executable(clone / ".venv/bin/python", "exit 1")  # what an interrupted set-up may leave
    env = {"MTL_DIST_PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(clone)}
    error = one_line(run("bash", clone / "launch/test.sh", env=env), clone)
    assert error.startswith("error: pip: ERROR: Cannot install hatchling")
    log = Path(error.partition("(log: ")[2].rstrip(")").replace("ROOT", str(clone)))
    assert "hatchling" in log.read_text()
    assert run(clone / ".venv/bin/python", "--version").returncode == 0
    assert not list(clone.glob(".venv/.mtl_dist_*")), "neither finished nor killed"


def test_an_environment_left_by_a_killed_pip_is_made_anew(clone):
    executable(clone / ".venv/bin/python", "exit 0")  # looks usable
    (clone / ".venv/.mtl_dist_unfinished").touch()
    executable(clone / "python", 'case "$2" in venv) echo "disk full" ; exit 1 ;; *) exit 0 ;; esac')
    done = run("bash", clone / "launch/test.sh", env={"MTL_DIST_PYTHON": str(clone / "python")})
    assert one_line(done, clone).startswith(
        "error: ROOT/python -m venv: disk full (log: ROOT/runs/setup/test-"
    )
    assert not (clone / ".venv").exists()


def installed(clone: Path, extra: str) -> None:
    """Makes the clone use the environment of these tests, as a finished set-up would."""
    (clone / ".venv").mkdir()
    for entry in Path(sys.prefix).iterdir():
        (clone / ".venv" / entry.name).symlink_to(entry)
    stamp = run("bash", "-c", f'source "{clone}/launch/_setup.sh"; stamp {extra}')
    (clone / f".venv/.mtl_dist_{extra}").unlink(missing_ok=True)  # of the environment that is linked to
    (clone / f".venv/.mtl_dist_{extra}").write_text(stamp.stdout)


def test_quickstart_trains_on_two_processes_and_shows_the_table(clone):
    installed(clone, "recipes")
    done = run("bash", clone / "launch/quickstart.sh", "steps=12", "weighting=mgda")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    assert "12 steps, 2 process(es) on cpu, weighting MGDA(" in done.stdout
    header = next(line for line in done.stdout.splitlines() if line.startswith("task "))
    assert header.split("  ")[0] == "task"
    for column in ("loss", "metric", "final weight", "grad norm"):
        assert column in header
    paths = [line.removeprefix("wrote ") for line in done.stdout.splitlines() if line.startswith("wrote ")]
    assert len(paths) == 2
    summary = json.loads((clone / paths[1]).read_text())
    assert summary["num_processes"] == 2
    assert summary["settings"]["steps"] == 12


def test_a_wrong_setting_of_quickstart_is_one_line(clone):
    installed(clone, "recipes")
    done = run("bash", clone / "launch/quickstart.sh", "stepz=12")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "mtl_dist.train: configs/recipe/multi_digits.yaml: "
        "'stepz' (= 12) is not a setting; did you mean 'steps'?"
    ]
    assert not (clone / "runs" / "quickstart").exists()


def test_the_tests_script_passes_arguments_through_and_leaves_out_long_tests(clone):
    installed(clone, "test")
    (clone / "tests").mkdir()
    marked = "import pytest\n\n@pytest.mark.long\ndef test_long(): pass\n\ndef test_short(): pass\n"
    (clone / "tests" / "test_two.py").write_text(marked)
    short = run("bash", clone / "launch/test.sh", "-q", "--collect-only")
    assert short.stdout.splitlines()[0] == "tests/test_two.py::test_short"
    assert "1 deselected" in short.stdout
    both = run("bash", clone / "launch/test.sh", "--long", "-q", "--collect-only")
    assert both.stdout.splitlines()[:2] == ["tests/test_two.py::test_long", "tests/test_two.py::test_short"]


def test_a_changed_pyproject_asks_for_a_new_installation(clone):
    installed(clone, "test")
    before = (clone / ".venv/.mtl_dist_test").read_text()
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    after = run("bash", "-c", f'source "{clone}/launch/_setup.sh"; stamp test').stdout
    assert before != after

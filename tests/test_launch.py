"""The scripts of launch/: help, one clear line where they cannot go on, a real training on two ranks."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import pytest
from program import BIN, ROOT, run

from mtl_dist.tracking import read_rows

ALL = sorted(path.name for path in (ROOT / "launch").glob("[!_]*.sh"))
SCRIPTS = ("quickstart.sh", "test.sh")
RECIPE = "configs/recipe/multi_digits.yaml"


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


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_needs_nothing(clone, script, option):
    done = run("bash", clone / "launch" / script, option)
    assert done.returncode == 0
    usage = done.stdout.splitlines()[0]
    assert usage.startswith("usage: ")
    assert f" launch/{script}" in usage
    assert "#" not in done.stdout.replace("#SBATCH", "")
    assert not (clone / ".venv").exists()


def test_shellcheck_finds_nothing():
    done = run(BIN / "shellcheck", "-x", "-P", "launch", *sorted((ROOT / "launch").glob("*.sh")), ".ci/run")
    assert (done.returncode, done.stdout) == (0, "")


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
    mark(clone, extra)


def mark(clone: Path, extra: str) -> None:
    (clone / f".venv/.mtl_dist_{extra}").unlink(missing_ok=True)  # of the environment that is linked to
    done = run("bash", "-c", f'source "{clone}/launch/_setup.sh"; mark_installed {extra}')
    assert done.returncode == 0, done.stderr


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
    assert [Path(path).name for path in paths] == ["metrics.jsonl", "summary.json", "report.html"]
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


def test_setup_of_the_tests_runs_none(clone):
    installed(clone, "test")
    done = run("bash", clone / "launch/test.sh", "--setup")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_changed_pyproject_asks_for_a_new_installation(clone):
    installed(clone, "test")
    before = (clone / ".venv/.mtl_dist_test").read_text()
    with (clone / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    after = run("bash", "-c", f'source "{clone}/launch/_setup.sh"; stamp test').stdout
    assert before != after


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("node.sh", "what to train is missing; see bash launch/node.sh --help"),
        ("node.sh ddp", "what to train is missing; see bash launch/node.sh --help"),
        ("debug.sh", "what to train is missing; see bash launch/debug.sh --help"),
        (
            f"node.sh zero4 {RECIPE}",
            "no engine 'zero4'; choose one of ddp, fsdp2, zero0, zero1, zero2, zero3, or give a file for "
            "accelerate launch --config_file",
        ),
        (
            f"multinode.sh ddp {RECIPE}",
            "NNODES='': give the number of machines, 2 or more (for one: launch/node.sh)",
        ),
        (
            f"slurm.sh ddp {RECIPE}",
            f"this is not a SLURM job; submit it: sbatch launch/slurm.sh ddp {RECIPE}",
        ),
    ],
)
def test_what_is_missing_is_one_line(clone, command, error):
    script, *arguments = command.split()
    assert one_line(run("bash", clone / "launch" / script, *arguments), clone) == f"error: {error}"


@pytest.mark.parametrize("head", ["", "node0", "node0:", ":29500"])
def test_a_rendezvous_without_host_and_port_is_one_line(clone, head):
    env = {"NNODES": "2", "HEAD": head}
    error = one_line(run("bash", clone / "launch/multinode.sh", "ddp", RECIPE, env=env), clone)
    assert error == f"error: HEAD='{head}': give host:port of one of the machines, such as HEAD=node0:29500"


def test_fsdp2_without_gpu_is_one_line(clone):
    installed(clone, "recipes")
    error = one_line(run("bash", clone / "launch/node.sh", "fsdp2", RECIPE), clone)
    assert error.startswith("error: no GPU is visible, and Accelerate runs FSDP only on accelerators;")


def test_deepspeed_without_compiler_is_one_line(clone):
    installed(clone, "recipes,deepspeed")
    done = run("bash", clone / "launch/node.sh", "zero2", RECIPE, env={"CXX": "no-such-compiler"})
    assert "finds no 'no-such-compiler'; install one (apt install g++)" in one_line(done, clone)


@pytest.fixture
def told(clone):
    """Runs a script in a clone where `accelerate` tells how it was called, on a machine with some GPUs."""
    installed(clone, "recipes")
    mark(clone, "recipes,deepspeed")
    (clone / ".venv/bin").unlink()  # the link to the real ones
    variables = "ACCELERATE_USE_CPU DS_ACCELERATOR MTL_DIST_NUM_PROCESSES"
    tell = f'echo "$@"; for v in {variables}; do eval "echo $v=\\${{$v:-}}"; done'
    executable(clone / ".venv/bin/accelerate", tell)

    def of(num_gpus, script, *arguments, **env):
        # the settings are checked elsewhere: here python counts GPUs
        executable(clone / ".venv/bin/python", f"echo {num_gpus}")
        done = run("bash", clone / "launch" / script, *arguments, env=env)
        assert done.returncode == 0, done.stderr
        line, *values = done.stdout.splitlines()
        return line.replace(str(clone), "ROOT").split(), dict(value.split("=") for value in values)

    return of


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_every_gpu_gets_a_process(told, engine):
    line, variables = told(4, "node.sh", engine, RECIPE, "steps=3", MIXED_PRECISION="bf16")
    file = f"ROOT/configs/engine/{engine}.yaml"
    program = ["-m", "mtl_dist.train", RECIPE, "steps=3"]
    options = ["--config_file", file, "--num_processes", "4", "--mixed_precision", "bf16"]
    assert line == ["launch", *options, *program]
    assert variables["MTL_DIST_NUM_PROCESSES"] == "4"
    assert variables["DS_ACCELERATOR"] == ""


@pytest.mark.parametrize("engine", ["ddp", "zero0", "zero1", "zero2", "zero3"])
def test_without_gpu_the_cpu_form_is_taken(told, engine):
    line, variables = told(0, "node.sh", engine, RECIPE, ACCELERATE_USE_CPU="true")
    assert line[:5] == [
        "launch",
        "--config_file",
        f"ROOT/configs/engine/{engine}_cpu.yaml",
        "--num_processes",
        "2",
    ]
    # the variable would turn DeepSpeed into DDP
    assert variables["ACCELERATE_USE_CPU"] == ("true" if engine == "ddp" else "")
    assert variables["DS_ACCELERATOR"] == ("" if engine == "ddp" else "cpu")
    assert variables["MTL_DIST_NUM_PROCESSES"] == "2"


def test_several_nodes_are_counted(told):
    line, variables = told(8, "multinode.sh", "zero3", RECIPE, NNODES="3", HEAD="node0:1234")
    assert variables["MTL_DIST_NUM_PROCESSES"] == "24"
    for pair in ("--num_processes 24", "--num_machines 3", "--rdzv_backend c10d"):
        assert pair in " ".join(line)
    assert "--main_process_ip node0 --main_process_port 1234" in " ".join(line)


def summary(folder: Path):
    return json.loads((folder / "summary.json").read_text())


def test_debug_trains_in_one_plain_process(clone, tmp_path):
    installed(clone, "recipes")
    done = run("bash", clone / "launch/debug.sh", RECIPE, "steps=2", f"output_dir={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    engine = summary(tmp_path / "out")["engine"]
    assert (engine["distributed_type"], engine["num_processes"]) == ("NO", 1)
    assert engine["model"] == "MultiDigitsNet"


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ddp", ("MULTI_CPU", None, 2)),
        # the commands that it makes are compared above, and tests/test_engine_configs.py runs them
        pytest.param("zero2", ("DEEPSPEED", 2, 2), marks=pytest.mark.long),
    ],
)
def test_node_trains_with_the_engine_it_was_asked_for(clone, tmp_path, name, found):
    installed(clone, "recipes")
    mark(clone, "recipes,deepspeed")
    settings = ["steps=2", f"output_dir={tmp_path / 'out'}"]
    done = run("bash", clone / "launch/node.sh", name, RECIPE, *settings, timeout=200)
    assert done.returncode == 0, done.stderr
    engine = summary(tmp_path / "out")["engine"]
    assert (engine["distributed_type"], engine["zero_stage"], engine["num_processes"]) == found


@pytest.fixture
def slurm(clone, tmp_path):
    """Runs launch/slurm.sh as sbatch does. `srun` starts its command once for each node, on this machine."""
    installed(clone, "recipes")
    tools = tmp_path / "tools"
    show = 'test "$*" = "show hostnames first,second" && echo 127.0.0.1 && echo second'
    requeue = f'requeue) echo "$@" >>{tmp_path}/requeued'
    executable(tools / "scontrol", f"case $1 in {requeue} ;; *) {show} ;; esac")
    everything = f"pkill -USR1 -f 'mtl_dist.train .*={tmp_path}/out'"  # the launchers too, as SLURM
    executable(tools / "scancel", f'echo "$@" >>{tmp_path}/sent; {everything}')
    both = 'shift; SLURM_NODEID=0 "$@" & a=$!; SLURM_NODEID=1 "$@" & b=$!; wait $a && wait $b'
    one = 'if [ "$SLURM_JOB_NUM_NODES" = 1 ]; then shift; exec "$@"; fi'
    executable(tools / "srun", f'test "$1" = --kill-on-bad-exit=1 || exit 9; {one}; {both}')
    shutil.copy(clone / "launch/slurm.sh", tmp_path / "slurm_script")  # sbatch runs a copy

    def of(nodes, *settings, before=""):
        env = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "SLURM_SUBMIT_DIR": str(clone),
            "SLURM_JOB_ID": "77",
            "SLURM_JOB_NUM_NODES": str(nodes),
            "SLURM_JOB_NODELIST": "first,second",
            "NPROC_PER_NODE": "1",
            "PORT": str(free_port()),
        }
        script = f'{before} exec bash "{tmp_path}/slurm_script" "$@"'
        arguments = ["ddp", RECIPE, f"output_dir={tmp_path / 'out'}", *settings]
        return run("bash", "-c", script, "slurm", *arguments, env=env, cwd=tmp_path, timeout=200)

    return of


def test_a_slurm_job_trains_on_all_its_nodes(slurm, tmp_path):
    done = slurm(2, "steps=2")
    assert done.returncode == 0, done.stderr
    engine = summary(tmp_path / "out")["engine"]
    assert (engine["distributed_type"], engine["num_processes"]) == ("MULTI_CPU", 2)
    assert done.stdout.count("2 steps, 2 process(es) on cpu") == 1  # one of the nodes has rank 0
    assert "this job has no GPUs (sbatch --gpus-per-node G asks for them): training on the CPU" in done.stderr


@pytest.mark.long
def test_a_slurm_job_saves_ahead_of_its_time_limit_and_goes_on_when_it_is_queued_again(slurm, tmp_path):
    """A real signal to the script, as --signal=B:USR1 sends it."""
    metrics = tmp_path / "out" / "metrics.jsonl"
    signal = f"(until [ -s {metrics} ]; do sleep 0.1; done; kill -USR1 $$) &"
    settings = ("steps=400", "recipe.num_validation=20", "checkpoint_every=1000")
    first = slurm(1, *settings, before=signal)
    assert first.returncode != 0
    assert (tmp_path / "sent").read_text() == "--signal=USR1 77\n"
    assert (tmp_path / "requeued").read_text() == "requeue 77\n", first.stderr
    said = re.search(r"stopped by a signal after step (\d+) of 400, which is saved", first.stderr)
    saved = int(said[1])
    assert (tmp_path / "out" / "checkpoints" / f"step_{saved:08d}").is_dir()
    again = slurm(1, "steps=" + str(saved + 1), *settings[1:])
    assert again.returncode == 0, again.stderr
    assert [row["train/global_step"] for row in read_rows(metrics)] == list(range(1, saved + 2))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_a_job_submitted_elsewhere_says_so(tmp_path):
    done = run("bash", ROOT / "launch/slurm.sh", "ddp", RECIPE, env={"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 1
    assert done.stderr == f"error: submit this job in the repository; {tmp_path} is not the repository\n"

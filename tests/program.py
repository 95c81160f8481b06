"""Runs the training program as a user does: real processes, a hard time limit, warnings looked at."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "recipe" / "multi_digits.yaml"
BIN = Path(sys.executable).parent
SUPERVISED = (sys.executable, "-I", "-S", str(Path(__file__).parent / "supervise.py"), str(os.getpid()))
# DeepSpeed compiles at first use. Environments that share the result, or find another ninja, each take
# the other's for stale, and every launch waits while one compiles anew
EXTENSIONS = Path(sys.prefix) / "torch_extensions"
OPERATOR = EXTENSIONS / "deepspeed_shm_comm"
_OWN = {
    "OMP_NUM_THREADS": "1",
    "ACCELERATE_USE_CPU": "true",
    "TORCH_EXTENSIONS_DIR": str(EXTENSIONS),
    "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]),
}


def run(
    *command: object, timeout: float = 240, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Output of a command; on the time limit all its processes are ended and the test fails.

    They are ended as well where the test ends in another way, and where this process is killed.
    """
    prepare_deepspeed()
    return run_only(*command, timeout=timeout, cwd=cwd, env=env)


def run_only(
    *command: object, timeout: float, cwd: Path = ROOT, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As `run`, of what has nothing to do with DeepSpeed."""
    process = subprocess.Popen(
        [*SUPERVISED, *(str(part) for part in command)],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException as error:  # pytest's own time limit and Ctrl-C among them
        process.terminate()
        out, err = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise AssertionError(f"{command} hung for {timeout} s\n{out}\n{err}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def prepare_deepspeed() -> None:
    """What launch/test.sh did before, unless pytest was started without it: DeepSpeed's operator is compiled.

    A launch that was killed meanwhile may have left torch's lock, for which every later one would wait.
    """
    compiled = (OPERATOR / f"{OPERATOR.name}.so").exists() and not (OPERATOR / "lock").exists()
    if not compiled and shutil.which(os.environ.get("CXX", "c++")):
        done = run_only(sys.executable, ROOT / "launch" / "_deepspeed.py", EXTENSIONS, timeout=600)
        assert done.returncode == 0, done.stderr


def environment(others: dict[str, str] | None = None) -> dict[str, str]:
    """What a command of a test finds: nothing that was meant for another launch, and `others`."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MTL_DIST_"))
    }
    return {**inherited, **_OWN, **(others or {})}


def train(
    output: Path, num_processes: int, *overrides: str, config: Path = CONFIG, timeout: float = 240
) -> str:
    """Trains a recipe on exactly `num_processes`; returns what it printed. Fails on errors and warnings."""
    import warm  # which imports this module

    settings = [
        f"output_dir={output}",
        f"num_processes={num_processes}",
        "recipe.num_validation=101",
        *overrides,
    ]
    done = warm.launch(
        *("mtl_dist.train", num_processes, config, *settings), timeout=timeout, modules=warm.TRAINING
    )
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout

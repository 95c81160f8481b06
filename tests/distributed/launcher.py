"""Starts a script on W real processes, with a hard time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def launch(
    script: str, num_processes: int, *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess:
    """Runs tests/distributed/`script` with torchrun (plain Python for one process) and returns its output.

    Nothing is left running: on the time limit the whole process group is killed and the test fails.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(HERE / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "EXPECTED_WORLD_SIZE": str(num_processes)}
    paths = (HERE, HERE.parent / "weighting", HERE.parents[1])
    environment["PYTHONPATH"] = os.pathsep.join(str(path) for path in paths)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        message = f"{script} on {num_processes} processes hung for {timeout} s\n{out}\n{err}"
        raise AssertionError(message) from None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def succeed(script: str, num_processes: int, *arguments: str, timeout: float = 120) -> str:
    """As `launch`; fails unless the script ends well. Returns what it printed."""
    done = launch(script, num_processes, *arguments, timeout=timeout)
    assert done.returncode == 0, f"{script} on {num_processes} processes:\n{done.stdout}\n{done.stderr}"
    return done.stdout

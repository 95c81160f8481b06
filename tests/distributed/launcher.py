"""Starts a script on W real processes, with a hard time limit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from program import ROOT, run

HERE = Path(__file__).parent


def launch(
    script: str, num_processes: int, *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """Runs tests/distributed/`script` with torchrun (plain Python for one process) and returns its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(HERE / script), *arguments]
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent / "weighting", ROOT))
    environment = {"EXPECTED_WORLD_SIZE": str(num_processes), "PYTHONPATH": path}
    return run(*command, timeout=timeout, env=environment)


def succeed(script: str, num_processes: int, *arguments: str, timeout: float = 120) -> str:
    """As `launch`; fails unless the script ends well. Returns what it printed."""
    done = launch(script, num_processes, *arguments, timeout=timeout)
    assert done.returncode == 0, f"{script} on {num_processes} processes:\n{done.stdout}\n{done.stderr}"
    return done.stdout

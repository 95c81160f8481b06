"""Starts a script on W real processes, with a hard time limit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import warm
from program import ROOT

HERE = Path(__file__).parent


def launch(
    script: str,
    num_processes: int,
    *arguments: str,
    timeout: float = 120,
    modules: tuple[str, ...] = warm.TORCH,
) -> subprocess.CompletedProcess[str]:
    """Runs tests/distributed/`script` on ranks that have `modules` imported, and returns its output."""
    path = os.pathsep.join(str(folder) for folder in (HERE, HERE.parent / "weighting", ROOT))
    environment = {"EXPECTED_WORLD_SIZE": str(num_processes), "PYTHONPATH": path}
    return warm.launch(
        HERE / script, num_processes, *arguments, timeout=timeout, env=environment, modules=modules
    )


def succeed(script: str, num_processes: int, *arguments: str, timeout: float = 120, **others: object) -> str:
    """As `launch`; fails unless the script ends well. Returns what it printed."""
    done = launch(script, num_processes, *arguments, timeout=timeout, **others)
    assert done.returncode == 0, f"{script} on {num_processes} processes:\n{done.stdout}\n{done.stderr}"
    return done.stdout

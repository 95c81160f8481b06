"""Launches the training program on two CPU processes, as the headers of configs/engine say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from program import BIN, CONFIG, ROOT, run

FOLDER = ROOT / "configs" / "engine"
HELPERS = ROOT / "tests" / "configs"


def header(name: str) -> str:
    text = (FOLDER / name).read_text()
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))


def documented(name: str) -> str:
    """The command of a file's header."""
    (command,) = re.findall(r"^#   (.*accelerate launch .*) CONFIG$", header(name), re.MULTILINE)
    return command


def launch(
    command: str, folder: Path, *settings: str, config: Path = CONFIG
) -> subprocess.CompletedProcess[str]:
    """Runs a shell line, with the recipe and its settings after it."""
    line = " ".join([command, str(config), *(f"'{each}'" for each in (f"output_dir={folder}", *settings))])
    # ACCELERATE_USE_CPU is for the header to set; the program is to refuse another number of processes
    clean = ["env", "-u", "ACCELERATE_USE_CPU", f"PATH={BIN}:/usr/bin:/bin", "MTL_DIST_NUM_PROCESSES=2"]
    return run(*clean, "bash", "-c", line, timeout=200)


def launch_engine(
    name: str, folder: Path, *settings: str, config: Path = CONFIG
) -> subprocess.CompletedProcess[str]:
    """The command of an engine's header. FSDP2 runs by a switch that no user should set: see HELPERS."""
    command = documented("fsdp2.yaml" if name == "fsdp2" else f"{name}_cpu.yaml")
    if name == "fsdp2":
        program = f"--num_processes 2 {HELPERS / 'fsdp_without_gpu.py'}"
        command = command.replace("--num_processes 8 -m mtl_dist.train", program)
    return launch(command, folder, *settings, config=config)


def whole_parameters(folder: Path, *checkpoints: Path) -> list[dict[str, torch.Tensor]]:
    """All parameters of checkpoints of any engine; `folder` is for files in between."""
    targets = [folder / f"{k}.pt" for k in range(len(checkpoints))]
    pairs = [part for pair in zip(checkpoints, targets, strict=True) for part in pair]
    done = run(sys.executable, HELPERS / "whole_parameters.py", *pairs, env={"DS_ACCELERATOR": "cpu"})
    assert done.returncode == 0, done.stderr
    return [torch.load(target, weights_only=True) for target in targets]


def vectors(found: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """Each one as a vector; they have the same names."""
    assert all(sorted(each) == sorted(found[0]) for each in found)
    return [torch.cat([each[name].flatten() for name in sorted(each)]) for each in found]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """How far `a` is from `b`, as a part of `b`."""
    return float((a - b).norm() / b.norm())

"""Checks with a small training whether a machine and its launcher do what was asked for.

mtl-dist doctor                                                      one process
torchrun --nproc_per_node 2 -m mtl_dist.doctor                       any launcher
accelerate launch --config_file configs/engine/zero2.yaml -m mtl_dist.doctor
mtl-dist doctor --machines 2 --head node0:29500 CONFIG               before a start: on each machine
"""

from __future__ import annotations

from mtl_dist.doctor.examine import add_arguments, run_command
from mtl_dist.doctor.line import Line

__all__ = ["Line", "add_arguments", "run_command"]

"""Checks with a small training whether a machine and its launcher do what was asked for.

mtl-dist doctor                                                      one process
torchrun --nproc_per_node 2 -m mtl_dist.doctor                       any launcher
accelerate launch --config_file configs/engine/zero2.yaml -m mtl_dist.doctor
"""

from __future__ import annotations

from mtl_dist.doctor.examine import Line, add_arguments, run_command

__all__ = ["Line", "add_arguments", "run_command"]

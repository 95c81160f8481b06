"""Whether a machine and its launcher train what was asked for, found out by training.

mtl-dist doctor                                                      one process
torchrun --nproc_per_node 2 -m mtl_dist.doctor                       any launcher
accelerate launch --config_file configs/engine/zero2.yaml -m mtl_dist.doctor
"""

from __future__ import annotations

from mtl_dist.doctor.examine import Line, add_arguments, run_command

__all__ = ["Line", "add_arguments", "run_command"]

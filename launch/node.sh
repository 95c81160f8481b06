#!/usr/bin/env bash
# usage: bash launch/node.sh ENGINE CONFIG [key=value ...]
#        bash launch/node.sh --setup ENGINE      installs what the engine needs, and stops
#
# Trains on one machine: on every visible GPU, or on 2 CPU processes if there is no GPU.
#
#   bash launch/node.sh ddp configs/recipe/multi_digits.yaml
#   bash launch/node.sh zero2 configs/recipe/multi_digits.yaml weighting=mgda steps=100
#   CUDA_VISIBLE_DEVICES=0,1 MIXED_PRECISION=bf16 bash launch/node.sh fsdp2 configs/recipe/multi_digits.yaml
#   MTL_DIST_NUM_PROCESSES=4 CUDA_VISIBLE_DEVICES= bash launch/node.sh ddp configs/recipe/multi_digits.yaml
#
# ENGINE  ddp, fsdp2, zero0, zero1, zero2 or zero3: configs/engine/ENGINE.yaml says what it is and when to use it.
#         Without a GPU, ENGINE_cpu.yaml is used. Or the path of a file for `accelerate launch --config_file`.
# CONFIG  a recipe; key=value changes any of its settings. batch_size is global: it is divided by the number of
#         processes, so that the training is the same on any number of processes.
#
# MTL_DIST_NUM_PROCESSES  number of processes (default: one per visible GPU; 2 on a CPU). If another number of
#                         processes or another engine runs, the training stops with an error
# MIXED_PRECISION         no, bf16 or fp16; replaces the value in the engine's file
# MAX_RESTARTS            how often the processes are started again when one fails (default: 0). They then go on from
#                         the last checkpoint by themselves (resume_from=auto)
# CUDA_VISIBLE_DEVICES    the GPUs to use; empty: train on the CPU
# MTL_DIST_PYTHON         the Python that creates .venv in the first run (3.11 or newer)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

manual "${BASH_SOURCE[0]}" 2 "$@"
if [ "$1" = --setup ]; then
  find_engine "$2"
  prepare
  exit 0
fi
find_engine "$1"
shift
setup "$EXTRA"
check_settings "$@"
choose_device
if [ "$NUM_GPUS" = 0 ]; then NUM_GPUS=2; fi
export MTL_DIST_NUM_PROCESSES="${MTL_DIST_NUM_PROCESSES:-$NUM_GPUS}"
start -- "$@"

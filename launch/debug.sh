#!/usr/bin/env bash
# usage: bash launch/debug.sh CONFIG [key=value ...]
#
# Trains in one plain Python process, without a launcher, on the first visible GPU or on the CPU. breakpoint(), pdb
# and profilers work, and a crash of native code prints the Python stack. Every step is measured a second time with
# plain autograd and printed as a table. Problems that make the weights useless are reported, with task, rank, step
# and what to do (check=false turns this off). Operations are deterministic if torch has a deterministic version.
#
#   bash launch/debug.sh configs/recipe/multi_digits.yaml steps=20
#   bash launch/debug.sh configs/recipe/multi_digits.yaml steps=20 virtual_ranks=4     one process plays 4 ranks
#   bash launch/debug.sh configs/recipe/multi_digits.yaml steps=20 on_nonfinite=raise weighting=mgda
#   CUDA_VISIBLE_DEVICES= bash launch/debug.sh configs/recipe/multi_digits.yaml     on the CPU
#
# MIXED_PRECISION       no (default), bf16, or on a GPU fp16
# CUDA_VISIBLE_DEVICES  the GPU; empty: the CPU
# MTL_DIST_PYTHON       the Python that creates .venv in the first run (3.11 or newer)

set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

manual "${BASH_SOURCE[0]}" 1 "$@"
setup recipes
check_settings "$@"
if [ "$NUM_GPUS" = 0 ]; then
  export ACCELERATE_USE_CPU=true
elif [ "$NUM_GPUS" != 1 ]; then
  visible="${CUDA_VISIBLE_DEVICES:-0}"
  export CUDA_VISIBLE_DEVICES="${visible%%,*}"
fi
export MTL_DIST_NUM_PROCESSES=1
if [ -n "${MIXED_PRECISION:-}" ]; then export ACCELERATE_MIXED_PRECISION="$MIXED_PRECISION"; fi
export CUBLAS_WORKSPACE_CONFIG="${CUBLAS_WORKSPACE_CONFIG:-:4096:8}" # needed for deterministic matrix products
exec "$VENV/bin/python" -X faulthandler -m mtl_dist.train "$1" check=true "${@:2}"

#!/usr/bin/env bash
# Sets everything up and trains the recipe multi_digits, on every GPU or on 2 CPU processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [key=value ...]

Creates .venv, installs mtl_dist, trains configs/recipe/multi_digits.yaml on every GPU (on 2 CPU processes if
there is no GPU), and prints a table and the names of the files it wrote. key=value changes a setting:

  bash launch/quickstart.sh weighting=mgda steps=100

MTL_DIST_PYTHON         the Python that creates .venv (3.11 or newer)
MTL_DIST_NUM_PROCESSES  number of processes
TEXT
}

case "${1:-}" in -h | --help)
  usage
  exit 0
  ;;
esac

find_engine ddp
setup recipes
cd "$ROOT"

check_settings configs/recipe/multi_digits.yaml "$@"
choose_device
if [ "$NUM_GPUS" = 0 ]; then NUM_GPUS=2; fi
export MTL_DIST_NUM_PROCESSES="${MTL_DIST_NUM_PROCESSES:-$NUM_GPUS}"
# batch_size is global: 64 samples per process. The training stops if another number of processes runs
settings=("output_dir=runs/quickstart/$(date +%Y%m%d-%H%M%S)-$$" "batch_size=$((64 * MTL_DIST_NUM_PROCESSES))")
start -- configs/recipe/multi_digits.yaml "${settings[@]}" "$@"

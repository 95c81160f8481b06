#!/usr/bin/env bash
# Sets everything up and trains the Multi-Digits recipe: on every GPU, or on 2 CPU processes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/quickstart.sh [key=value ...]

Makes .venv, installs mtl_dist, trains configs/recipe/multi_digits.yaml on every GPU (on 2 processes where
there is none), and prints a table and the files it wrote. Settings are those of the configuration:

  bash launch/quickstart.sh weighting=mgda steps=100

MTL_DIST_PYTHON         which Python makes .venv (3.11 or newer)
MTL_DIST_NUM_PROCESSES  how many processes train
TEXT
}

case "${1:-}" in -h | --help)
  usage
  exit 0
  ;;
esac

setup recipes
cd "$ROOT"

# checked in one process first: a launcher would bury the message about a wrong setting
check='import sys, torch; from mtl_dist.train import main; print(torch.cuda.device_count()); sys.exit(main(sys.argv[1:]))'
num_gpus="$("$VENV/bin/python" -c "$check" --check configs/recipe/multi_digits.yaml "$@")" || exit 2
if [ "$num_gpus" = 0 ]; then
  export ACCELERATE_USE_CPU=true
  export MTL_DIST_NUM_PROCESSES="${MTL_DIST_NUM_PROCESSES:-2}"
else
  export MTL_DIST_NUM_PROCESSES="${MTL_DIST_NUM_PROCESSES:-$num_gpus}"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# batch_size is global: 64 samples a process. The training refuses to run on another number of processes
settings=("output_dir=runs/quickstart/$(date +%Y%m%d-%H%M%S)-$$" "batch_size=$((64 * MTL_DIST_NUM_PROCESSES))")
program=(-m mtl_dist.train configs/recipe/multi_digits.yaml "${settings[@]}" "$@")

if [ "$MTL_DIST_NUM_PROCESSES" = 1 ]; then
  exec "$VENV/bin/python" "${program[@]}"
fi
# not --cpu: Accelerate's CPU launcher needs MPI and starts one process without it
exec "$VENV/bin/accelerate" launch --config_file configs/engine/ddp.yaml \
  --num_processes "$MTL_DIST_NUM_PROCESSES" "${program[@]}"

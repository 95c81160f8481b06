#!/usr/bin/env bash
# Shows on this machine's GPUs that the library is right and what it costs; installs nothing, needs no network.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/gpu.sh [--part NAME ...] [--out FOLDER] [--brief] [--again]

Runs on all GPUs of this machine, with a Python that has torch 2.9 or newer and numpy. It takes less than 10 minutes,
installs nothing and needs no network. Without a GPU it runs its small form on the CPU. It writes one JSON file per
part and report.md, which name the hardware, and ends in a verdict; the exit status is 1 unless everything passed.
A run that was interrupted goes on where it stopped.

  --part NAME    doctor, core, syncs, matrix, training, clients, overhead or models; default: all of them
  --out FOLDER   where the results go (default: runs/gpu)
  --brief        the small form
  --again        forget what these parts have found so far

MTL_DIST_PYTHON  the Python to use; default: the first of .venv, python3 and python that has torch
TEXT
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac

has_torch() { # python command
  is_suitable "$1" && "$1" -c '
import numpy, torch
major, minor = map(int, torch.__version__.split(".")[:2])
raise SystemExit((major, minor) < (2, 9))' >/dev/null 2>&1
}

candidates=("$VENV/bin/python" python3 python python3.13 python3.12 python3.11)
if [ -n "${MTL_DIST_PYTHON:-}" ]; then candidates=("$MTL_DIST_PYTHON"); fi
for python in "${candidates[@]}"; do
  if command -v "$python" >/dev/null 2>&1 && has_torch "$python"; then
    cd "$ROOT"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    exec "$python" -m benchmarks.gpu "$@"
  fi
done
fail "no Python 3.11 or newer with torch 2.9 or newer and numpy among ${candidates[*]}: name one in MTL_DIST_PYTHON"

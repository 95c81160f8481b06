#!/usr/bin/env bash
# Tests every engine with every option on the CPU of this machine, and writes a table.
#
# Each cell is a real training of 10 steps on 2 processes. Its weights and parameters must agree with those of one
# process on the concatenated batch. A cell that cannot work must raise an error with its reason on every rank. Takes
# about 15 minutes on 2 cores. The exit status is 1 if a cell fails.
#
#   bash launch/matrix.sh                           everything; the table goes to benchmarks/results/engines.md
#   bash launch/matrix.sh --only '^zero-3: .*bf16'  cells whose name matches; the table goes only to the terminal
#   bash launch/matrix.sh --only fsdp2 -o /tmp/t.md the table goes also to a file
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/matrix.sh [--only PATTERN] [-o FILE] [--list]

Creates .venv, installs mtl_dist with its test dependencies, and tests all engines on the CPU: plain torch, DDP, FSDP2
and DeepSpeed ZeRO 0 to 3, directly and through Accelerate, with every precision, accumulation, checkpointing,
compilation, probe and rule. Takes about 15 minutes on 2 cores. The exit status is 1 if a cell fails.

  --only PATTERN  run only cells whose name matches the regular expression, such as '^fsdp2: .*bf16'
  -o FILE         write the table to this file (default: benchmarks/results/engines.md for the whole matrix,
                  no file with --only)
  --list          print the names of the cells and stop
TEXT
}

for argument in "$@"; do
  case "$argument" in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done

setup test
if has_compiler; then compile_deepspeed; fi
cd "$ROOT"
export OMP_NUM_THREADS=1
case " $* " in
  *" --only"* | *" -o "* | *" --output"* | *" --list "*) ;;
  *) set -- -o benchmarks/results/engines.md ;;
esac
exec "$VENV/bin/python" tests/engines/matrix.py "$@"

#!/usr/bin/env bash
# Runs every engine against every option on this machine's CPU, and writes a table.
#
# Each cell is a real training of 10 steps on 2 processes, compared with one process on the concatenated batch:
# weights and parameters must agree. A cell that cannot work must refuse, on every rank, with its reason. Takes
# about 15 minutes on 2 cores. Ends with 1 where a cell fails.
#
#   bash launch/matrix.sh                           all of it, table to benchmarks/results/engines.md
#   bash launch/matrix.sh --only '^zero-3: .*bf16'  cells whose name matches, table to the terminal only
#   bash launch/matrix.sh --only fsdp2 -o /tmp/t.md the table to a file as well
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/matrix.sh [--only PATTERN] [-o FILE] [--list]

Makes .venv, installs mtl_dist with its test dependencies, and runs the engine matrix on the CPU: plain torch, DDP,
FSDP2 and DeepSpeed ZeRO 0 to 3, directly and through Accelerate, against precision, accumulation, checkpointing,
compilation, probes and rules. About 15 minutes on 2 cores. Ends with 1 where a cell fails.

  --only PATTERN  cells whose name matches the regular expression, such as '^fsdp2: .*bf16'
  -o FILE         where the table is written (default: benchmarks/results/engines.md for the whole matrix,
                  nowhere with --only)
  --list          names of the cells, without running them
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

#!/usr/bin/env bash
# Sets everything up and runs the tests.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/test.sh [--long] [pytest arguments ...]
       bash launch/test.sh --setup

Makes .venv, installs mtl_dist with its test dependencies, compiles what DeepSpeed needs on a CPU (once, where there is
a compiler), runs the tests that take less than a minute each.

  --long   the long ones too
  --setup  prepares all of it, and runs no test

MTL_DIST_TEST_WORKERS  how many test files run at a time (default 2; 0: in one process, for pdb)
TEXT
}

selection=(-m "not long")
only_setup=""
case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
  --long)
    selection=()
    shift
    ;;
  --setup) only_setup=yes ;;
esac

setup test
if has_compiler; then compile_deepspeed; fi
if [ -n "$only_setup" ]; then exit 0; fi
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# whole files, as tests of a file share launches, in the order of tests/conftest.py
workers=(-n "${MTL_DIST_TEST_WORKERS:-2}" --dist loadfile --no-loadscope-reorder)
exec "$VENV/bin/python" -m pytest "${workers[@]}" ${selection[@]+"${selection[@]}"} "$@"

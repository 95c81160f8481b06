#!/usr/bin/env bash
# Runs a selection of the tests with every supported version of torch, and writes a table.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/versions.sh [VERSION ...] [--parts PART ...] [--remove] [--out FOLDER]

Makes an environment for each version of torch (2.9 to 2.14) with the Accelerate, DeepSpeed and transformers of its
time, and for 2.9 with the lower bounds of pyproject.toml. Then it runs the tests of core, probes, DDP, FSDP2,
ZeRO, Accelerate and Trainer with each. About 4 minutes and 7 GB of disk a version. The exit status is 1 if a test fails.

  VERSION         such as 2.12; default: all
  --parts PART    only these columns of the table; the others keep what they had
  --remove        removes each environment after its tests
  --out FOLDER    where versions.json and versions.md go (default: benchmarks/results)

MTL_DIST_VERSIONS  the folder of the environments (default: runs/versions)
MTL_DIST_PYTHON    the Python to make them with
TEXT
}

versions=()
while [ "$#" -gt 0 ]; do
  case "$1" in
    -h | --help)
      usage
      exit 0
      ;;
    -*) break ;;
  esac
  versions+=("$1")
  shift
done
python="$(find_python)" || exit 1
if [ "${#versions[@]}" -gt 0 ]; then set -- --only "${versions[@]}" "$@"; fi
exec "$python" "$ROOT/benchmarks/versions.py" "$@"

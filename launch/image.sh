#!/usr/bin/env bash
# Builds the `cpu` image for real on a Debian machine without Docker and without a registry of images, and runs it.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

usage() {
  cat <<'TEXT'
usage: bash launch/image.sh [FOLDER]

Makes a base image from Debian's packages (mmdebstrap: bookworm, Python 3.11), builds the `cpu` target of ./Dockerfile
on it (buildah, isolated by chroot), and runs the quickstart and a part of the tests inside. Takes about 15 minutes and
10 GB in FOLDER (default: runs/image), which also keeps one log per step. The storage is removed at the end.

Needs root, and: apt-get install --no-install-recommends buildah mmdebstrap
The image reads this machine's pip settings (PIP_FIND_LINKS, /etc/xdg/pip), so it uses wheels that lie here.
TEXT
}

case "${1:-}" in
  -h | --help)
    usage
    exit 0
    ;;
esac

out="${1:-$ROOT/runs/image}"
missing=""
for tool in buildah mmdebstrap; do command -v "$tool" >/dev/null 2>&1 || missing="$missing $tool"; done
if [ -n "$missing" ]; then fail "missing:$missing; apt-get install --no-install-recommends$missing"; fi
if [ "$(id -u)" != 0 ]; then fail "this user is $(id -un), and mmdebstrap and chroot need root"; fi
mkdir -p "$out"
out="$(cd "$out" && pwd)"
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs

images() { buildah --root "$out/storage" --runroot "$out/run" "$@"; }

# Runs one step; if it fails, the last lines of its log are the error: they name what this machine refuses.
step() { # name command...
  local name="$1" log="$out/$1.log" began=$SECONDS
  shift
  if ! "$@" >"$log" 2>&1 </dev/null; then
    tail -n 15 "$log" >&2
    fail "$name (log: $log)"
  fi
  printf '%s: %s s\n' "$name" "$((SECONDS - began))"
}

make_base() {
  local container
  if [ ! -f "$out/base.tar" ]; then
    mmdebstrap --variant=minbase --include=python3,python3-dev,python3-venv,python-is-python3,ca-certificates bookworm \
      "$out/base.part.tar"
    mv "$out/base.part.tar" "$out/base.tar"
  fi
  container="$(images from scratch)"
  images add "$container" "$out/base.tar" /
  images commit --rm "$container" localhost/mtl-dist-base:latest
}

# What pip in the image needs to install as pip does here: the settings of this machine, and the folders they name.
pip_settings() {
  local folder keys="index-url|extra-index-url|find-links|constraint|cert"
  {
    printf '[global]\n'
    python3 -m pip config list | sed -nE "s/^(:env:|global)\.($keys)='(.*)'$/\2 = \3/p" | sort -u
  } >"$out/pip.conf"
  volumes=(--volume "$out/pip.conf:/etc/pip.conf:ro")
  for folder in /opt /etc/xdg/pip /etc/ssl/certs; do
    if [ -d "$folder" ] && grep -q "$folder" "$out/pip.conf"; then volumes+=(--volume "$folder:$folder:ro"); fi
  done
  arguments=(--build-arg "PYTHON_IMAGE=localhost/mtl-dist-base:latest")
  if [ -n "${PIP_FIND_LINKS:-}" ]; then arguments+=(--build-arg "TORCH_INDEX=file://$PIP_FIND_LINKS"); fi
}

build() {
  images bud --pull=never --layers=false "${arguments[@]}" "${volumes[@]}" --target cpu \
    -t localhost/mtl-dist:cpu "$ROOT"
}

inside() { # command...
  images run "$container" -- "$@"
}

remove_storage() {
  images rm --all >/dev/null 2>&1 || true
  rm -rf "$out/storage" "$out/run"
}

trap remove_storage EXIT
step base make_base
pip_settings
step build build
container="$(images from --pull=never localhost/mtl-dist:cpu)"
step quickstart inside bash launch/quickstart.sh steps=20
step tests inside bash launch/test.sh -q tests/test_stats.py tests/test_balancer.py \
  tests/distributed/test_collectives.py
tail -n 1 "$out/tests.log"

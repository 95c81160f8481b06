# shellcheck shell=bash
# Shared by the scripts in launch/: finds a Python, makes .venv in the repository, installs into it.
# Source it after `set -euo pipefail`, then call `setup EXTRA`. On any problem it prints one line and exits 1.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
UNFINISHED="$VENV/.mtl_dist_unfinished" # there while pip runs

fail() {
  printf 'error: %s\n' "$1" >&2
  exit 1
}

is_suitable() { # python command
  "$1" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the command of the first suitable Python; MTL_DIST_PYTHON names one instead.
find_python() {
  local candidate found="" candidates=(python3.13 python3.12 python3.11 python3 python)
  if [ -n "${MTL_DIST_PYTHON:-}" ]; then candidates=("$MTL_DIST_PYTHON"); fi
  for candidate in "${candidates[@]}"; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if is_suitable "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
    found="$found $candidate is $("$candidate" --version 2>&1 | head -n 1 || true);"
  done
  found="${found:- no python on PATH;}"
  fail "Python 3.11 or newer is needed, and not found:$found install one, or name it in MTL_DIST_PYTHON"
}

# What the installation depends on. Equal stamps mean that there is nothing to do.
stamp() { # extra
  printf '%s\n' "$1" "$ROOT"
  cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt" | cksum
}

is_done() { # extra
  [ "$(cat "$VENV/.mtl_dist_$1" 2>/dev/null)" = "$(stamp "$1")" ]
}

# Says that the environment has these extras already, as in an image that was built with them.
mark_installed() { # extras...
  local extra
  for extra in "$@"; do
    stamp "$extra" >"$VENV/.mtl_dist_$extra"
  done
}

# Makes .venv anew where it is missing, broken, or left by a set-up that was killed: pip takes a half-copied
# package for an installed one.
make_venv() { # log
  local python
  if [ ! -e "$UNFINISHED" ] && is_suitable "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1
  then
    return
  fi
  python="$(find_python)" || exit 1
  rm -rf "$VENV"
  "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    fail "$python has no venv module; install it (Debian and Ubuntu: apt install python3-venv)"
  "$python" -m venv "$VENV" >"$1" 2>&1 || fail "$python -m venv: $(tail -n 1 "$1") (log: $1)"
}

# The line of pip's output that says what went wrong: its first ERROR, which names the package (of an isolated
# build it is indented, and only general advice follows), else its last line.
pip_error() { # log
  local found
  found="$(grep -m 1 '^ *ERROR:' "$1" || grep -v '^[[:space:]]*$' "$1" | tail -n 1 || true)"
  printf '%s\n' "$found" | sed 's/^ *//'
}

# Installs the repository with one extra, every version pinned, and leaves a stamp.
install_pinned() { # extra
  local pins="$ROOT/constraints.txt" log="$ROOT/runs/setup/$1-$$.log"
  make_venv "$log"
  printf 'installing mtl-dist[%s] into %s (log: %s)\n' "$1" "$VENV" "$log" >&2
  touch "$UNFINISHED"
  # the variables reach the isolated build too: the first with old pip, the second from pip 25.3 on
  if ! PIP_CONSTRAINT="$pins" PIP_BUILD_CONSTRAINT="$pins" "$VENV/bin/python" -m pip install \
    --disable-pip-version-check -c "$pins" -e "${ROOT}[$1]" >"$log" 2>&1 </dev/null; then
    rm "$UNFINISHED" # pip ended by itself, so nothing is half done
    fail "pip: $(pip_error "$log") (log: $log)"
  fi
  mark_installed "$1"
  rm "$UNFINISHED"
}

# Makes the environment ready and puts it first on PATH; takes no time where it is.
setup() { # extra
  if ! is_done "$1"; then
    mkdir -p "$ROOT/runs/setup"
    (
      # two scripts started at once set up one after the other, where the system can lock
      if command -v flock >/dev/null 2>&1; then flock 9; fi
      is_done "$1" || install_pinned "$1"
    ) 9>"$ROOT/runs/setup/lock"
  fi
  # DeepSpeed compiles at first use, with the ninja it finds. Environments that share the result, or find another
  # ninja, each take the other's for stale, and every launch waits while one compiles anew
  export PATH="$VENV/bin:$PATH" TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$VENV/torch_extensions}"
}

# Compiles, once, the operator that DeepSpeed compiles at its first use on a CPU. A launch that was killed while it
# compiled, or looked whether to, leaves a lock for which every later one would wait: see _deepspeed.py.
compile_deepspeed() {
  local place="$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm" log="$ROOT/runs/setup/deepspeed-$$.log"
  if [ -f "$place/deepspeed_shm_comm.so" ] && [ ! -e "$place/lock" ]; then return; fi
  mkdir -p "$ROOT/runs/setup"
  printf 'compiling an operator of DeepSpeed into %s (log: %s)\n' "$TORCH_EXTENSIONS_DIR" "$log" >&2
  "$VENV/bin/python" "$ROOT/launch/_deepspeed.py" "$TORCH_EXTENSIONS_DIR" >"$log" 2>&1 </dev/null ||
    fail "DeepSpeed's operator does not compile: $(tail -n 1 "$log") (log: $log)"
}

has_compiler() {
  command -v "${CXX:-c++}" >/dev/null 2>&1
}

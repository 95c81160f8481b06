#!/usr/bin/env bash
# Builds the site into build/site, from docs/ and the docstrings. Every warning is an error.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

case "${1:-}" in
  "") ;;
  -h | --help)
    printf 'usage: bash launch/docs.sh\n\nMakes .venv, installs what the site needs, builds it into build/site.\n'
    exit 0
    ;;
  *) fail "unknown argument '$1'; see bash launch/docs.sh --help" ;;
esac

setup docs
cd "$ROOT"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$VENV/bin/python" launch/docs.py
NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --strict -f build/docs/mkdocs.yml
printf 'wrote %s; to read it: python -m http.server -d build/site\n' "$ROOT/build/site/index.html"

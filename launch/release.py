"""Checks that a tag can be released: `python launch/release.py v0.1.0`. Prints what is wrong, with status 1.

The tag is the version of the package, and CHANGELOG.md has a section of this version with a date.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """What stands against the release, one sentence each."""
    version = tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    package = (root / "mtl_dist" / "__init__.py").read_text("utf-8")
    changes = (root / "CHANGELOG.md").read_text("utf-8")
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml has the version {version}")
    if f'__version__ = "{version}"' not in package:
        found.append(f"mtl_dist/__init__.py does not have the version {version}")
    if not re.search(rf"^## {re.escape(version)} - \d{{4}}-\d\d-\d\d$", changes, flags=re.MULTILINE):
        found.append(f"CHANGELOG.md has no line '## {version} - YYYY-MM-DD'")
    return found


def main() -> int:
    """The command line."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python launch/release.py TAG\n")
        return 2
    found = problems(sys.argv[1])
    sys.stderr.writelines(f"error: {problem}\n" for problem in found)
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Finds the locks that interrupted compilations leave, for which every later launch waits silently.

DeepSpeed compiles operators at first use. torch guards that by a file `lock`, and its wait has no end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_LOGGER = logging.getLogger("mtl_dist")


def stale_locks(environment: Mapping[str, str] = os.environ) -> list[Path]:
    """Locks of compilations that no process of this machine has open."""
    given = environment.get("TORCH_EXTENSIONS_DIR")
    folder = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    held = set(_open_files()) if locks else set()
    return [lock for lock in locks if lock.exists() and _identity(lock) not in held]


def warn_of_stale_locks() -> None:
    """One line for each of them, before the wait begins. It may be held on another machine, so it stays."""
    for lock in stale_locks():
        _LOGGER.warning(
            "mtl_dist: %s is left by a compilation that was interrupted, and this launch may wait for it for "
            "ever: delete it, unless another machine is compiling just now",
            lock,
        )


def _open_files() -> Iterator[tuple[int, int]]:
    """Device and number of every file that a process has open, as far as this user can see."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield _identity(descriptor)
        except OSError:  # closed meanwhile, or of another user
            continue


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino

"""Files that survive a kill and a power cut: written whole, flushed to the disk, then given their name.

A system writes data to the disk later than the program asks for it, and names before data. After a power cut,
a file that was renamed into place without a flush is there and empty.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

# what file systems answer that cannot flush a folder (CIFS, some FUSE ones)
_NO_FOLDERS = (errno.EINVAL, errno.EACCES, errno.ENOTSUP, errno.EISDIR)


def write_whole(path: Path, content: bytes) -> None:
    """The whole content under `path`, on the disk, or what was there before."""
    unfinished = path.with_name(path.name + ".tmp")
    with unfinished.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    move(unfinished, path)


def move(source: Path, target: Path) -> None:
    """Renames a file or folder, and flushes the folders that name it. A file at `target` is replaced.

    Flush what `source` holds before.
    """
    source.replace(target)
    for folder in {source.parent, target.parent}:
        flush(folder)


def flush(path: Path) -> None:
    """Returns when the content of a file, or the names in a folder, are on the disk."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.name == "nt":  # Windows opens no folders
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _NO_FOLDERS):
            raise
    finally:
        os.close(descriptor)


def flush_tree(folder: Path) -> None:
    """Flushes every file below `folder`, every folder, and the folder itself."""
    for path in sorted(folder.rglob("*"), reverse=True):  # what a folder names, before the folder
        flush(path)
    flush(folder)

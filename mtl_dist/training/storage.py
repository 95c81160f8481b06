"""The output folder: whether it can be written, whether all ranks see one, and the words where not."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator

from mtl_dist.training.together import RunError, everyone, raise_together

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
# torch and safetensors report a full disk without its number
_WRITE_FAILED = re.compile(
    r"iostream error|inline_container\.cc|failed writing|os error (28|122)\b|No space left"
)
_LEAVE_SECONDS = 10.0  # after a kill, data loading workers live on for a moment, with the locks of their run
_LOOK_SECONDS = 30.0  # NFS remembers for so long that a name was not there


def explain_storage(error: BaseException, folder: Path, need: int = 0) -> str | None:
    """An error of a file system in one sentence; None if `error` is of another kind.

    Args:
        error: what was raised.
        folder: the output folder.
        need: bytes of what was written; 0 if that is not known.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number in _REFUSED:
        return (
            f"output_dir: {str(folder)!r} cannot be written ({os.strerror(number)}): make it writable for "
            f"this user, or choose another output_dir"
        )
    if number in _FULL or (number is None and _WRITE_FAILED.search(str(error))):
        needed = f", and a checkpoint needs {in_bytes(need)}" if need else ""
        return (
            f"output_dir: {str(folder)!r} has no space left ({in_bytes(_free(folder))} free{needed}): delete "
            "files there, keep fewer checkpoints (keep_last=1), or choose another output_dir"
        )
    if isinstance(error, OSError) and error.filename is not None:
        return f"output_dir: {str(folder)!r}: {error}"
    return None


@contextmanager
def storage_in_words(folder: Path, need: int = 0) -> Iterator[None]:
    """Turns errors of a file system inside into `RunError`."""
    try:
        yield
    except Exception as error:
        words = explain_storage(error, folder, need)
        if words is None:
            raise
        raise RunError(words) from error


@contextmanager
def alone_in(folder: Path, seconds: float = _LEAVE_SECONDS) -> Iterator[None]:
    """Inside, no other run on a machine that shares the folder's locks can enter it.

    The lock ends with the process. File systems that lock no folders (NFS) let every run in, and so does
    Windows.

    Args:
        folder: the output folder.
        seconds: how long to wait for a run that is just ending.

    Raises:
        ValueError: another run is inside.
    """
    if os.name == "nt":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not _locked(descriptor, seconds):
            raise ValueError(
                f"output_dir: another run is writing into {str(folder)!r}: wait until it has ended, or "
                "choose another output_dir"
            )
        yield
    finally:
        os.close(descriptor)


def check_storage(folder: Path, need: int = 0) -> None:
    """Raises unless `folder` can be made or written, and has `need` bytes of free space. Changes nothing.

    Raises:
        ValueError: it cannot.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output_dir: {str(existing)!r} is a file: choose another output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f"output_dir: {str(existing)!r} cannot be written: make it writable for this user, or choose "
            "another output_dir"
        )
    if (free := _free(existing)) < max(need, 1):
        raise ValueError(
            f"output_dir: {str(folder)!r} has {in_bytes(free)} of free space, and its checkpoints will need "
            f"{in_bytes(need)}: delete files there, keep fewer checkpoints (keep_last=1), or choose another "
            "output_dir"
        )


def check_shared(accelerator: Accelerator, folder: Path, seconds: float = _LOOK_SECONDS) -> None:
    """Raises on every rank unless all ranks see what rank 0 writes into `folder`. All ranks call it.

    Args:
        accelerator: of the run.
        folder: the output folder, which exists.
        seconds: how long to look.

    Raises:
        RunError: some ranks have a folder of their own.
    """
    if accelerator.num_processes == 1:
        return
    name: str = everyone(accelerator, f".shared-{uuid.uuid4().hex}")[0]
    problem = None
    if accelerator.is_main_process:
        try:
            (folder / name).touch()
        except OSError as error:
            problem = explain_storage(error, folder)
    raise_together(accelerator, problem)  # nobody looks before it is written
    found = everyone(accelerator, (socket.gethostname(), _appears(folder / name, seconds)))
    if accelerator.is_main_process:
        (folder / name).unlink(missing_ok=True)
    blind = [rank for rank, (_, sees) in enumerate(found) if not sees]
    problem = None
    if blind:
        hosts = ", ".join(sorted({found[rank][0] for rank in blind}))
        problem = (
            f"output_dir: {str(folder)!r} is not one folder for all ranks: ranks {blind} on {hosts} cannot "
            f"find what rank 0 on {found[0][0]} wrote there; choose a folder on a file system that all "
            f"machines share, by its absolute path"
        )
    raise_together(accelerator, problem)


def in_bytes(number: float) -> str:
    """A size for people, such as 1.5 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def tree_size(folder: Path) -> int:
    """Bytes of all files below `folder`."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _locked(descriptor: int, seconds: float) -> bool:
    fcntl, limit = importlib.import_module("fcntl"), time.monotonic() + seconds  # Windows has none
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                return False
            time.sleep(0.2)
        except OSError:  # this file system locks no folders
            return True
        else:
            return True


def _appears(path: Path, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > limit:
            return False
        time.sleep(0.2)
    return True


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free

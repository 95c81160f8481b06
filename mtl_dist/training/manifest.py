"""The manifest of a checkpoint: what must be there. Written last, and verified before anything is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mtl_dist.durable import write_whole
from mtl_dist.tracking.files import CHECKPOINT_PATTERN

MANIFEST = "mtl_dist.json"
_FORMAT = 1


class Damaged(ValueError):
    """A checkpoint is not what was written. The message names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds.

    Attributes:
        step: optimizer steps done.
        num_processes: the ranks that wrote it.
        engine: how they trained, such as "zero2".
        identity: the settings that a resumed run must not change.
        files: by path within the checkpoint, its bytes and its SHA-256.
    """

    step: int
    num_processes: int
    engine: str
    identity: Mapping[str, Any]
    files: Mapping[str, tuple[int, str]]

    def write(self, folder: Path) -> None:
        """Writes it into `folder`."""
        values = {"format": _FORMAT, **asdict(self)}
        text = json.dumps({**values, "sha256": _digest_of(values)}, indent=1) + "\n"
        write_whole(folder / MANIFEST, text.encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint, whose files are all there, with their sizes.

    Raises:
        ValueError: `folder` is no checkpoint, or one of another version.
        Damaged: a file is missing, or has another size.
    """
    path = folder / MANIFEST
    if not path.is_file():
        if fnmatch(folder.name, CHECKPOINT_PATTERN) and folder.is_dir():
            raise damaged(folder, MANIFEST, "is missing")
        raise ValueError(f"{str(folder)!r} is not a checkpoint; give a folder step_* or 'latest'")
    try:
        values = json.loads(path.read_bytes())
        digest = values.pop("sha256", None)
    except (ValueError, AttributeError, TypeError):
        raise damaged(folder, MANIFEST, f"is not what was written ({path.stat().st_size} bytes)") from None
    if values.get("format") != _FORMAT:
        raise ValueError(
            f"{str(folder)!r} is a checkpoint of format {values.get('format')}, and this version of mtl_dist "
            f"reads format {_FORMAT}: resume with the version that wrote it, or start a new run"
        )
    if digest != _digest_of(values):
        raise damaged(folder, MANIFEST, "is not what was written")
    values.pop("format")
    manifest = Manifest(**{**values, "files": {name: tuple(row) for name, row in values["files"].items()}})
    for name, (size, _) in manifest.files.items():
        file = folder / name
        if not file.is_file():
            raise damaged(folder, name, "is missing")
        if file.stat().st_size != size:
            raise damaged(folder, name, f"has {file.stat().st_size} bytes instead of {size}")
    return manifest


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """The first of these files that is not what was written, in words; None: all are. It reads them."""
    for name in names:
        try:
            if digest(folder / name) != manifest.files[name][1]:
                return str(damaged(folder, name, "has another content than was written"))
        except OSError as error:
            return str(damaged(folder, name, f"cannot be read ({error.strerror})"))
    return None


def digest(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def damaged(folder: Path, name: str, what: str) -> Damaged:
    """The error that names the file."""
    return Damaged(f"the checkpoint {str(folder)!r} is damaged: {name} {what}")


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

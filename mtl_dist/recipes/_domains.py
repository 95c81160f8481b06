"""Four kinds of text from files of Python and scikit-learn. Nothing is downloaded.

Documents depend only on the versions of Python and scikit-learn, and have a fixed order.
"""

from __future__ import annotations

import ast
import os
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

# modules in pure Python, one file each, which exist in every version from 3.11
_MODULES = (
    *("argparse", "calendar", "codecs", "configparser", "csv", "dataclasses", "difflib", "dis", "enum"),
    *("fractions", "ftplib", "functools", "heapq", "imaplib", "inspect", "ipaddress", "mailbox", "pdb"),
    *("random", "shutil", "smtplib", "statistics", "string", "subprocess", "tarfile", "textwrap"),
    *("threading", "traceback", "typing", "weakref"),
)
_TABLES = ("digits", "breast_cancer", "wine", "diabetes", "iris")
_TABLE_ROWS = 20  # per document
_HELD_OUT = 5  # one of this many documents is for validation

Documents = Iterator[tuple[str, str]]  # name, text


def code() -> Documents:
    """Python's standard library, without docstrings and comment lines."""
    for name, source, tree in _modules():
        lines = source.splitlines()
        for node in _docstrings(tree):
            assert node.end_lineno is not None  # it was parsed, not built
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
        kept = (line.rstrip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
        yield name, "\n".join(kept)


def docstrings() -> Documents:
    """The docstrings of Python's standard library."""
    for name, _, tree in _modules():
        texts = (ast.literal_eval(node.value) for node in _docstrings(tree))
        yield name, "\n\n".join("\n".join(line.strip() for line in text.splitlines()) for text in texts)


def numbers() -> Documents:
    """Rows of the data sets of scikit-learn.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets  # an optional dependency, for recipes only
    except ImportError as error:
        raise ImportError(
            'the recipe text_mixture needs scikit-learn: pip install "mtl-dist[recipes]"'
        ) from error

    for name in _TABLES:
        table = getattr(datasets, f"load_{name}")()
        rows = [
            ",".join(f"{value:.4g}" for value in (*row, target))
            for row, target in zip(table.data, table.target, strict=True)
        ]
        for start in range(0, len(rows), _TABLE_ROWS):
            yield f"{name} {start}", "\n".join(rows[start : start + _TABLE_ROWS])


def prose() -> Documents:
    """The reference manual of Python, as `help("topics")` shows it."""
    from pydoc_data.topics import topics  # half a megabyte

    yield from sorted(topics.items())


DOMAINS: Mapping[str, Callable[[], Documents]] = {
    "code": code,
    "docstrings": docstrings,
    "numbers": numbers,
    "prose": prose,
}


@cache
def streams(domain: str) -> tuple[Tensor, Tensor]:
    """Training and validation bytes of a domain, `[N]` uint8 each, from different documents."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for name, text in DOMAINS[domain]():
        held_out = zlib.crc32(name.encode()) % _HELD_OUT == 0
        parts[held_out].append(text.encode())
    train, validation = (torch.frombuffer(bytearray(b"\n\n".join(part)), dtype=torch.uint8) for part in parts)
    return train, validation


@cache
def _modules() -> list[tuple[str, str, ast.Module]]:
    """Name, source and syntax tree of each module."""
    folder = Path(os.__file__).parent
    sources = {name: (folder / f"{name}.py").read_text(encoding="utf-8") for name in _MODULES}
    return [(name, source, ast.parse(source)) for name, source in sources.items()]


def _docstrings(tree: ast.Module) -> Iterator[ast.Expr]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield first

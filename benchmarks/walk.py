"""Counts the way of one batch through the library: calls, files, and moves from file to file.

    python benchmarks/walk.py           three numbers: the third step of FeatureProbe and MGDA on three tasks
    python benchmarks/walk.py --path    the files in the order of the walk, one line per move

A reader who follows a batch with the finger makes these moves: one at each call or return that goes to
another file of the package. Comprehensions and generators belong to the function that contains them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

import mtl_dist
from mtl_dist import Balancer
from mtl_dist.weighting import MGDA

PACKAGE = str(Path(mtl_dist.__file__).parent)
TASKS = ("a", "b", "c")


class Walk:
    """Follows calls and returns inside the package.

    Attributes:
        calls: (file, function) of every call.
        path: the file after every call and every return.
    """

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.path: list[str] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Takes an event of `sys.setprofile`."""
        code = frame.f_code
        if event not in ("call", "return") or not _is_ours(frame) or code.co_name.startswith("<"):
            return
        if event == "call":
            self.calls.append((_file(frame), code.co_qualname))
            self.path.append(_file(frame))
        else:
            outer = frame.f_back
            while outer is not None and not _is_ours(outer):
                outer = outer.f_back
            self.path.append("the model" if outer is None else _file(outer))

    @property
    def moves(self) -> list[str]:
        """The files in the order they are entered, without repetition."""
        return [
            file for before, file in zip(["the model", *self.path], self.path, strict=False) if file != before
        ]


def _is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename[len(PACKAGE) + 1 :]


def walk() -> Walk:
    """The walk of the third batch."""
    torch.manual_seed(0)
    balancer = Balancer(TASKS, MGDA())
    trunk, heads = nn.Linear(4, 8), nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})

    def losses(task: str) -> Any:
        return lambda z: heads[task](z).square().mean()

    def step(profile: Walk | None = None) -> Tensor:
        z = trunk(torch.randn(5, 4))
        functions = {task: losses(task) for task in TASKS}
        sys.setprofile(profile)
        try:
            total: Tensor = balancer(z, functions)
        finally:
            sys.setprofile(None)
        return total

    for _ in range(2):
        step().backward()
    found = Walk()
    step(found)
    return found


def main() -> None:
    """Prints the counts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--path", action="store_true", help="show every move")
    arguments = parser.parse_args()
    found = walk()
    if arguments.path:
        print("\n".join(found.moves))
    files = {file for file, _ in found.calls}
    print(f"{len(found.calls)} calls in {len(files)} files, {len(found.moves)} moves from file to file")


if __name__ == "__main__":
    main()

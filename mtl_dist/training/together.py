"""What ranks tell each other outside of the steps, so that all of them go on or all of them stop."""

from __future__ import annotations

from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import gather_object

T = TypeVar("T")


class RunError(RuntimeError):
    """The run cannot begin, or cannot go on. The message says what to change.

    Attributes:
        everywhere: whether all ranks raise it, so that one of them can tell the user.
    """

    everywhere = False


def everyone(accelerator: Accelerator, mine: T) -> list[T]:
    """What every rank gives, in the order of the ranks. All ranks call it, and wait for each other."""
    if accelerator.num_processes == 1:
        return [mine]
    told: list[Any] = gather_object([mine])
    return told


def raise_together(accelerator: Accelerator, problem: str | None) -> None:
    """Raises `RunError` on every rank if one of them has a problem. All ranks call it."""
    problems = dict.fromkeys(text for text in everyone(accelerator, problem) if text is not None)
    if problems:
        error = RunError("\n".join(problems))
        error.everywhere = True
        raise error

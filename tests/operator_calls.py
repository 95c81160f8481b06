"""What a step costs in numbers without noise: operator calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counts the calls of operators that are no views, forward and backward.

    Attributes:
        calls: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not func.is_view:
            self.calls[func.overloadpacket._qualified_op_name.split("::")[-1]] += 1
        return func(*args, **(kwargs or {}))


def operators(step: Callable[[], object]) -> Counter[str]:
    """The operators that are no views in one call of `step`, by name."""
    mode = Operators()
    with mode:
        step()
    return mode.calls


def beyond(step: Callable[[], object], plain: Callable[[], object]) -> int:
    """How many operators `step` calls beyond those of `plain`."""
    return sum(operators(step).values()) - sum(operators(plain).values())

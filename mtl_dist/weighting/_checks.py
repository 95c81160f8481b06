"""Checks of hyperparameters, so that every rule refuses a bad value with the same sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Values = float | Mapping[str, float] | Sequence[float]


def check_positive(rule: object, name: str, values: Values, *, zero: bool = False) -> None:
    """Refuses a hyperparameter, one number or one per task, that is not finite and positive.

    Args:
        rule: whose hyperparameter it is.
        name: of the hyperparameter.
        values: a number, or one per task.
        zero: whether 0 is allowed too.

    Raises:
        ValueError: showing the name and the value received.
    """
    if isinstance(values, Mapping):
        numbers = list(values.values())
    else:
        numbers = [values] if isinstance(values, (int, float)) else list(values)
    if not all(math.isfinite(number) and (number > 0 or (zero and number == 0)) for number in numbers):
        kind = "non-negative" if zero else "positive"
        raise ValueError(f"{type(rule).__name__}: {name} must be finite and {kind}, got {values}")


def check_count(rule: object, name: str, value: int, *, low: int = 1) -> None:
    """Refuses a hyperparameter that is not a whole number of at least `low`.

    Raises:
        ValueError: showing the name and the value received.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{type(rule).__name__}: {name} must be an integer >= {low}, got {value}")

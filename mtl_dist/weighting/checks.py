"""Checks of hyperparameters: every rule rejects a bad value with the same message."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Values = float | Mapping[str, float] | Sequence[float]


def check_positive(rule: object, name: str, values: Values, *, zero: bool = False) -> None:
    """Rejects a hyperparameter that is not finite and positive.

    Args:
        rule: the rule that has the hyperparameter.
        name: name of the hyperparameter.
        values: one number, or one number per task.
        zero: whether 0 is allowed too.

    Raises:
        ValueError: with the name and the value received.
    """
    if isinstance(values, Mapping):
        numbers = list(values.values())
    else:
        numbers = [values] if isinstance(values, (int, float)) else list(values)
    if not all(math.isfinite(number) and (number > 0 or (zero and number == 0)) for number in numbers):
        kind = "non-negative" if zero else "positive"
        raise ValueError(f"{type(rule).__name__}: {name} must be finite and {kind}, got {values}")


def check_count(rule: object, name: str, value: int, *, low: int = 1) -> None:
    """Rejects a hyperparameter that is not an integer of at least `low`.

    Args:
        rule: the rule that has the hyperparameter.
        name: name of the hyperparameter.
        value: the value received.
        low: smallest allowed value.

    Raises:
        ValueError: with the name and the value received.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{type(rule).__name__}: {name} must be an integer >= {low}, got {value}")


def check_fraction(rule: object, name: str, value: float, *, one: bool = True) -> None:
    """Rejects a hyperparameter outside `[0, 1]`.

    Args:
        rule: the rule that has the hyperparameter.
        name: name of the hyperparameter.
        value: the value received.
        one: whether 1 is allowed. It is not for the decay of a moving average.

    Raises:
        ValueError: with the name and the value received.
    """
    if not (0 <= value < 1 or (one and value == 1)):  # rejects NaN too
        raise ValueError(
            f"{type(rule).__name__}: {name} must be in {'[0, 1]' if one else '[0, 1)'}, got {value}"
        )


def check_choice(rule: object, name: str, value: object, choices: Sequence[object]) -> None:
    """Rejects a hyperparameter that is not one of `choices`.

    Args:
        rule: the rule that has the hyperparameter.
        name: name of the hyperparameter.
        value: the value received.
        choices: the allowed values.

    Raises:
        ValueError: with the name, the allowed values and the value received.
    """
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{type(rule).__name__}: {name} must be one of {known}, got {value!r}")


def check_other_batches(combinator: object, rule: Any) -> None:
    """Rejects a rule that is about its own batch, in a combinator that uses what earlier batches gave.

    Raises:
        ValueError: with both.
    """
    if rule.own_batch:
        raise ValueError(
            f"{type(combinator).__name__}: {rule!r} weighs by the counts of its own batch, and those of "
            "earlier batches would be used: leave one of the two out"
        )

"""Checks of hyperparameters: every rule rejects a bad value with the same message."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
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
    given: Any = values.values() if isinstance(values, Mapping) else values
    many = isinstance(given, Iterable) and not isinstance(given, str) and _is_per_task(rule, name)
    numbers: list[Any] = list(given) if many else [values]
    if not all(is_finite(number) and (number > 0 or (zero and number == 0)) for number in numbers):
        kind = "non-negative" if zero else "positive"
        raise ValueError(f"{type(rule).__name__}: {name} must be finite and {kind}, got {values!r}")


def _is_per_task(rule: object, name: str) -> bool:
    """Whether a hyperparameter may have one value for each task, by its annotation."""
    known = [str(one.type) for one in fields(rule) if one.name == name] if is_dataclass(rule) else []
    return not known or "Mapping" in known[0] or "Sequence" in known[0]


def is_finite(value: Any) -> bool:
    """Whether it is one finite number; texts and booleans are none."""
    return _is_number(value) and math.isfinite(value)


def check_number(rule: object, name: str, value: float, *, infinite: bool = False) -> None:
    """Rejects a hyperparameter that is not one number.

    Args:
        rule: the rule that has the hyperparameter.
        name: name of the hyperparameter.
        value: the value received.
        infinite: whether an infinity is allowed too.

    Raises:
        ValueError: with the name and the value received.
    """
    if not (is_finite(value) or (infinite and _is_number(value) and math.isinf(value))):
        kind = "number or an infinity" if infinite else "finite number"
        raise ValueError(f"{type(rule).__name__}: {name} must be a {kind}, got {value!r}")


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, (str, bytes, bool)) and isinstance(float(value), float)
    except (TypeError, ValueError, OverflowError):
        return False


def check_inner(combinator: object, name: str, rule: Any) -> None:
    """Rejects what is no rule, in the place of one.

    Args:
        combinator: the rule that has it.
        name: name of the setting.
        rule: the value received.

    Raises:
        ValueError: with the name and the value received.
    """
    if isinstance(rule, type) or not callable(getattr(rule, "update", None)) or not hasattr(rule, "needs"):
        what = f"the class {rule.__name__}" if isinstance(rule, type) else repr(rule)
        raise ValueError(
            f"{type(combinator).__name__}: {name} must be a rule, an object such as MGDA(), got {what}"
        )


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
        raise ValueError(f"{type(rule).__name__}: {name} must be an integer >= {low}, got {value!r}")


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
    if not is_finite(value) or not (0 <= value < 1 or (one and value == 1)):
        raise ValueError(
            f"{type(rule).__name__}: {name} must be in {'[0, 1]' if one else '[0, 1)'}, got {value!r}"
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
    if not any(type(value) is type(choice) and value == choice for choice in choices):  # 1 == True
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

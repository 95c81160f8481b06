"""Checks of the settings of a probe: what is taken is what was written."""

from __future__ import annotations

from typing import Any

_SEEDS = 2**31  # a step's generator is seeded with `(seed << 32) + step`


def check_count(probe: object, name: str, *, optional: bool = False) -> None:
    """Raises `ValueError` unless the setting is a whole number >= 1 (or None, if it is `optional`)."""
    value = getattr(probe, name)
    if value is None and optional:
        return
    if not _is_whole(value) or value < 1:
        either, kind = "None or " if optional else "", "" if _is_whole(value) else "a whole number of "
        raise _wrong(probe, name, f"{either}{kind}at least 1", value)


def check_flag(probe: object, name: str, *, optional: bool = False) -> None:
    """Raises `ValueError` unless the setting is True or False (or None, if it is `optional`)."""
    value = getattr(probe, name)
    if not isinstance(value, bool) and not (value is None and optional):
        raise _wrong(probe, name, f"{'None, ' if optional else ''}True or False", value)


def check_seed(probe: object) -> None:
    """Raises `ValueError` unless `seed` is a whole number that a generator takes beside a step."""
    seed = probe.seed  # type: ignore[attr-defined]
    if not _is_whole(seed) or not 0 <= seed < _SEEDS:
        raise _wrong(probe, "seed", f"a whole number from 0 to {_SEEDS - 1}", seed)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong(probe: object, name: str, wanted: str, value: Any) -> ValueError:
    return ValueError(f"{type(probe).__name__}: {name} must be {wanted}, got {value!r}")

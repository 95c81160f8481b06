"""Settings of the wrong kind: every probe takes a value as it is, or says in a sentence which was wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mtl_dist.training.settings import PROBES

WRONG: list[Any] = [
    None, "x", "5", b"a", True, False, float("nan"), float("inf"), -1, 0, 1, 1.0, 2.5, 1j, 10**30, [], {},
    str.lower,
]  # fmt: skip
KINDS = {
    "every": int,
    "sketch": int,
    "bucket": int,
    "seed": int,
    "bias": bool,
    "reevaluate": bool,
    "form": str,
}
OPTIONAL = ("bucket", "sketch", "reevaluate", "parameters")


@pytest.mark.parametrize("name", PROBES)
def test_a_setting_is_taken_or_named(name: str) -> None:
    cls = PROBES[name]
    for field in dataclasses.fields(cls):
        for value in WRONG:
            try:
                cls(**{field.name: value})
            except ValueError as error:
                said = str(error)
            else:
                said = ""
            if said:
                assert said.startswith(f"{cls.__name__}: {field.name} must be "), (value, said)
                continue
            kind = type(str.lower) if field.name == "parameters" else KINDS[field.name]
            assert type(value) is kind or (value is None and field.name in OPTIONAL), (field.name, value)
            assert kind is not int or value is None or value >= 0

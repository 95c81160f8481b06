"""What a component is, in words that are the same wherever it is the same: on every rank and after a restart.

A component (rule, probe, recipe) is its class and its settings. `ByValue` gives this identity to classes that
are no dataclasses too.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class ByValue:
    """Base of components: `repr`, equality and hash follow from the class and the attributes.

    A dataclass makes its own ones from its fields. Any other class gets these.
    """

    def __repr__(self) -> str:
        """The class with its attributes, in the order of their names."""
        return canonical(self)

    def __eq__(self, other: object) -> bool:
        """Whether `other` is of the same class with equal attributes."""
        return type(self) is type(other) and canonical(self) == canonical(other)

    def __hash__(self) -> int:
        """Equal components have equal hashes."""
        return hash(canonical(self))


def canonical(value: Any) -> str:
    """A text for a setting: mappings and sets in one order, no addresses, fields that `repr` hides too."""
    return _text(value, [])


def without_words(value: Any) -> list[Any]:
    """The parts of a setting that `canonical` cannot tell apart, because their `repr` is only an address.

    Raises:
        ValueError: the setting holds itself.
    """
    found: list[Any] = []
    try:
        _text(value, found)
    except RecursionError:
        raise ValueError(f"a setting of {type(value).__qualname__} holds itself") from None
    return found


def tensor_bytes(value: Tensor) -> bytes:
    """The values of a tensor, float64 where they are floating-point. Reads them from the device."""
    host = value.detach().cpu()
    return (host.double() if host.is_floating_point() else host).contiguous().numpy().tobytes()


def _text(value: Any, nameless: list[Any]) -> str:
    tell: Callable[[Any], str] = functools.partial(_text, nameless=nameless)
    if isinstance(value, type):
        return value.__qualname__
    if is_dataclass(value):
        return _call(value, {f.name: getattr(value, f.name) for f in fields(value)}, tell)
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{tell(key)}: {tell(item)}" for key, item in value.items())) + "}"
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(tell, value))) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(tell, value)) + "]"
    if isinstance(value, np.ndarray) and value.dtype != object:
        is_numeric = value.dtype.kind in "biuf"
        return tell(torch.from_numpy(np.ascontiguousarray(value)) if is_numeric else value.tolist())
    if isinstance(value, Tensor):
        return f"tensor of shape {list(value.shape)}, {hashlib.sha256(tensor_bytes(value)).hexdigest()[:12]}"
    if isinstance(value, functools.partial):
        return f"partial({tell(value.func)}, {tell(value.args)}, {tell(value.keywords)})"
    if callable(value) and not isinstance(value, (Enum, ByValue)) and hasattr(value, "__qualname__"):
        return str(value.__qualname__)
    own: Any = type(value).__repr__
    if own is object.__repr__ or own is ByValue.__repr__:
        attributes = _attributes(value)
        if attributes or isinstance(value, ByValue):
            return _call(value, dict(sorted(attributes.items())), tell)
    text = repr(value)
    if not isinstance(value, (str, bytes)) and _ADDRESS.search(text):
        nameless.append(value)
        return _ADDRESS.sub("", text)
    return text


def _call(value: Any, attributes: Mapping[str, Any], tell: Callable[[Any], str]) -> str:
    inner = ", ".join(f"{name}={tell(item)}" for name, item in attributes.items())
    return f"{type(value).__qualname__}({inner})"


def _attributes(value: Any) -> dict[str, Any]:
    """Of the instance, in its dictionary or in slots."""
    slots = (getattr(cls, "__slots__", ()) for cls in type(value).__mro__)
    names = [name for part in slots for name in ((part,) if isinstance(part, str) else part)]
    held = {name: getattr(value, name) for name in names if name[:2] != "__" and hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}

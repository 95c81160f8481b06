"""Builds an object of a registry from its specification, such as `{name: smooth, rule: mgda}`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")
Spec = Any  # a name, or a mapping with `name` and fields; checked by building it
Nested = Callable[[Spec, str], Any]


@dataclass(frozen=True)
class Component(Generic[T]):
    """A component of a run: its specification, and the object that was built from it.

    Attributes:
        spec: as in the settings.
        object: built once, while the settings were loaded.
    """

    spec: Spec
    object: T


def build(spec: Spec, registry: Mapping[str, type[T]], path: str, nested: Mapping[type, Nested]) -> T:
    """The object that `spec` describes.

    Args:
        spec: a name in `registry`, or a mapping with `name` and arguments of the class.
        registry: name -> class. All arguments of the classes must be annotated.
        path: path of the specification in the settings, for messages.
        nested: base class of an argument -> function that builds it from its specification and path.

    Raises:
        ValueError: a name or argument is unknown, an argument is missing, or a value is wrong. The message
            shows the path, the value and what to do.
    """
    if not isinstance(spec, str | Mapping):
        raise ValueError(f"{path}: give a name, or a mapping with name and fields; got {spec!r}")
    fields = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = fields.pop("name", None)
    if not isinstance(name, str) or name not in registry:
        received = "no name" if name is None else repr(name)
        raise ValueError(f"{path}.name: got {received}{hint(str(name), registry)}")
    cls = registry[name]
    parameters = inspect.signature(cls).parameters
    hints = get_type_hints(cls if hasattr(cls, "__dataclass_fields__") else cls.__init__)
    arguments = {}
    for key, value in fields.items():
        if key not in parameters:
            raise ValueError(f"{path}.{key}: {name!r} has no such field{hint(key, parameters)}")
        arguments[key] = _value(value, hints[key], f"{path}.{key}", nested)
    required = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if required:
        raise ValueError(f"{path}: {name!r} needs {', '.join(required)}; got {spec!r}")
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def hint(name: str, valid: Iterable[str]) -> str:
    """`; did you mean ...`, or all valid names if no name is similar."""
    names = sorted(valid)
    if not names:
        return "; it takes none"
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(names)}"


def _value(value: Any, annotation: Any, path: str, nested: Mapping[type, Nested]) -> Any:
    """`value` with the type `annotation`: builds a nested component, and lets pydantic convert the rest."""
    for base, build_nested in nested.items():
        if isinstance(annotation, type) and issubclass(annotation, base):
            return build_nested(value, path)
    try:
        return TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        problems = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        raise ValueError(f"{path}: {problems}; got {value!r}") from None

"""Builds a component from its specification: `{name: smooth, rule: mgda}`, `{name: "my_rules:Largest"}`.

The name is one of a registry, or the import path `module:Class` of a class of one's own.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from pydantic import PydanticSchemaGenerationError, TypeAdapter, ValidationError

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


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of component.

    Attributes:
        base: the class that all of them are derived from.
        registry: name -> class, of the shipped ones.
    """

    base: type
    registry: Mapping[str, type[T]]


def build(spec: Spec, kind: Kind[T], path: str, nested: Mapping[type, Nested]) -> T:
    """The object that `spec` describes.

    Args:
        spec: a name, or a mapping with `name` and arguments of the class.
        kind: what it must be.
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
    cls = component_class(name, kind, f"{path}.name")
    parameters, hints = parameters_of(cls, f"{path}.name")
    arguments = {}
    for key, value in fields.items():
        if key not in parameters:
            raise ValueError(f"{path}.{key}: {name!r} has no such field{hint(key, parameters)}")
        arguments[key] = component_value(value, hints.get(key, Any), f"{path}.{key}", nested)
    required = [key for key, p in parameters.items() if p.default is p.empty and key not in arguments]
    if required:
        raise ValueError(f"{path}: {name!r} needs {', '.join(required)}; got {spec!r}")
    try:
        return cls(**arguments)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def search_beside(file: Path) -> None:
    """Lets import paths name modules that stand beside `file` or in the working folder, after all others."""
    for folder in (str(file.resolve().parent), str(Path.cwd())):
        if folder not in sys.path:
            sys.path.append(folder)


def load(name: str, path: str) -> Any:
    """What the import path `module:Name` names.

    Args:
        name: the import path.
        path: path in the settings, for messages.

    Raises:
        ValueError: there is no such module or name in it, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ValueError(
            f"{path}: got {name!r}; write an import path as module:Name, such as my_rules:Largest"
        )
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise ValueError(f"{path}: {module_name!r} has no {attribute!r}{hint(part, _public(found))}")
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"{path}: no module {error.name!r}; put {error.name.partition('.')[0]}.py beside the "
                "configuration or into the working folder, or install it"
            ) from None
        raise ValueError(f"{path}: importing {module_name!r} failed: {error}") from error
    except ImportError as error:
        raise ValueError(f"{path}: importing {module_name!r} failed: {error}") from error
    return found


def component_class(name: Any, kind: Kind[T], path: str) -> type[T]:
    """The class of a kind that a name or an import path names. Raises the errors of `build`."""
    if isinstance(name, str) and name in kind.registry:
        return kind.registry[name]
    if not isinstance(name, str) or ":" not in name:
        received = "no name" if name is None else repr(name)
        raise ValueError(
            f"{path}: got {received}{hint(str(name), kind.registry)}, or an import path module:Class"
        )
    cls, base = load(name, path), kind.base
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ValueError(
            f"{path}: {name!r} must be a class derived from {base.__module__}.{base.__qualname__}"
        )
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(getattr(cls, "__abstractmethods__", ())))
        raise ValueError(f"{path}: {name!r} must define {missing}")
    own: Any = cls
    return own  # type: ignore[no-any-return]  # a T, because it is derived from the base


def parameters_of(cls: type, path: str) -> tuple[Mapping[str, inspect.Parameter], dict[str, Any]]:
    """The arguments of a class, and their types. Raises `ValueError` for annotations that cannot be read."""
    try:
        hints = get_type_hints(cls if is_dataclass(cls) else inspect.getattr_static(cls, "__init__"))
    except NameError as error:
        raise ValueError(f"{path}: the annotations of {cls.__qualname__} cannot be read: {error}") from error
    return inspect.signature(cls).parameters, hints


def _public(module: Any) -> list[str]:
    return [name for name in vars(module) if not name.startswith("_")]


def hint(name: str, valid: Iterable[str]) -> str:
    """`; did you mean ...`, or all valid names if no name is similar."""
    names = sorted(valid)
    if not names:
        return "; it takes none"
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; choose one of {', '.join(names)}"


def component_value(
    value: Any, annotation: Any, path: str, nested: Mapping[type, Nested] | None = None
) -> Any:
    """`value` with the type `annotation`: a nested component is built, and pydantic checks the rest.

    It is strict as for JSON: a list becomes a tuple, and a string a path, but `true` is no number, and "5"
    and 5.0 are no whole ones.
    """
    for base, build_nested in (nested or {}).items():
        if isinstance(annotation, type) and issubclass(annotation, base):
            return build_nested(value, path)
    if annotation is Any:
        return value
    try:
        found = TypeAdapter(annotation).validate_json(json.dumps(value), strict=True)
    except PydanticSchemaGenerationError:  # a class of one's own, which checks what it gets
        return value
    except ValidationError as error:
        problems = " or ".join(dict.fromkeys(problem["msg"] for problem in error.errors()))
        raise ValueError(f"{path}: {problems}; got {value!r}") from None
    if type(found) is int and type(value) is not int:  # of Literal[0, 1], where 1 == 1.0 == True
        raise ValueError(f"{path}: Input should be a whole number; got {value!r}")
    return found

"""Plain values of a YAML file and of `key=value` overrides, before they are checked."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


class Loader(yaml.SafeLoader):
    """Plain values as in YAML 1.2, and every key once.

    PyYAML follows YAML 1.1, where 1e-4 is a text, 010 is 8, 1:30 is 90, `no` is false and 2026-11-26 is a
    date. It takes the last of two keys without a word.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # those of `_PLAIN`

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Raises `ConstructorError` for a key that stands twice."""
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":  # merged keys may be overridden
                continue
            if (before := lines.get(key.value)) is not None:
                line = key.start_mark.line + 1
                problem = f"{key.value!r} stands in line {before} and again in line {line}: keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        """A whole number, also with zeros in front."""
        return int(node.value)


_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_PLAIN = {  # tag: what is written so, and its first characters
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (rf"(?=.{{1,400}}$)[-+]?{_DIGITS}", list("-+0123456789")),  # Python reads no more than 4300
    "float": (
        rf"[-+]?(?:\.[0-9]+|{_DIGITS}(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
for _tag, (_pattern, _first) in _PLAIN.items():
    Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_decimal)

_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)  # `!!int x`, brackets of great depth


def read_values(path: Path) -> dict[str, Any]:
    """The settings of a YAML file. Raises `ValueError` for what is no mapping, and what cannot be read."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ValueError(
            f"no configuration file {str(path)!r}; the shipped ones are in configs/recipe"
        ) from None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read as a configuration: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except _NOT_YAML as error:
        raise ValueError(f"{path}: not valid YAML: {str(error) or type(error).__name__}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must be a mapping of settings, got {values!r}")
    return values


def set_value(values: dict[str, Any], override: str) -> None:
    """Sets `a.b=value` in place. If a component is only a name, it becomes a mapping when a field is set.

    Raises:
        ValueError: it is not of this form, or `a` is a value without fields.
    """
    dotted, equals, text = override.partition("=")
    keys = dotted.split(".")
    if not equals or not all(keys):
        raise ValueError(f"override {override!r}: write key=value, such as weighting.name=mgda")
    if not text.strip():  # often a variable of the shell that is not set
        raise ValueError(f"override {override!r}: there is no value; write {dotted}=null for none")
    try:
        value = yaml.load(text, Loader)
    except _NOT_YAML:
        raise ValueError(f"override {override!r}: the value is not valid YAML; quote it") from None
    for depth, key in enumerate(keys[:-1]):
        inner = values.setdefault(key, {})
        if isinstance(inner, str):
            inner = {"name": inner}
        elif inner is None:
            inner = {}
        if not isinstance(inner, dict):
            raise ValueError(
                f"override {override!r}: {'.'.join(keys[: depth + 1])} is {inner!r}, which has no fields"
            )
        values[key] = values = {**inner}  # an alias of YAML is the same object elsewhere
    values[keys[-1]] = value

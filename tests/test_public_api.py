"""The public names and signatures are those of `public_api.txt`: a change of them is seen in the diff.

To renew the file: `python -m tests.test_public_api`. CONTRIBUTING.md says what else a change needs.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path

FILE = Path(__file__).with_name("public_api.txt")
MODULES = [
    "mtl_dist",
    "mtl_dist.weighting",
    "mtl_dist.weighting.base",
    "mtl_dist.weighting.checks",
    "mtl_dist.weighting.helpers",
    "mtl_dist.grouping",
    "mtl_dist.solvers",
    "mtl_dist.testing",
    "mtl_dist.probes",
    "mtl_dist.probes.base",
    "mtl_dist.checkpoint",
    "mtl_dist.virtual",
    "mtl_dist.priors",
    "mtl_dist.recipes",
    "mtl_dist.tracking",
    "mtl_dist.tracking.report",
    "mtl_dist.integrations.accelerate",
    "mtl_dist.integrations.by_column",
    "mtl_dist.integrations.deepspeed",
    "mtl_dist.integrations.lightning",
    "mtl_dist.integrations.transformers",
    "mtl_dist.train",
]


def public_names(module_name: str) -> Iterator[tuple[str, object]]:
    """Of a package: what it exports. Of a module: what it defines."""
    module = importlib.import_module(module_name)
    is_package = hasattr(module, "__path__")
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    for name in sorted(names):
        value = getattr(module, name)
        if inspect.ismodule(value) or name == "annotations":
            continue
        home = getattr(value, "__module__", module_name)
        ours = isinstance(home, str) and home.startswith("mtl_dist") and (is_package or home == module_name)
        if ours and (inspect.isclass(value) or callable(value) or hasattr(module, "__all__")):
            yield name, value


def signature(function: object) -> str:
    """With annotations as they are written; defaults that are no literals are `...`."""
    given = inspect.signature(function)  # type: ignore[arg-type]
    shown = [
        each
        if isinstance(each.default, (type, type(None), str, int, float, tuple))
        else each.replace(default=...)
        for each in given.parameters.values()
    ]
    text = str(given.replace(parameters=shown)).replace("Ellipsis", "...")
    return re.sub(r"(: |-> )'([^']*)'", r"\1\2", text)


def members(cls: type) -> Iterator[str]:
    """Public methods, properties and fields that the library itself defines in a class or its bases."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("mtl_dist")]
    found: dict[str, object] = {}
    for base in reversed(own):
        found |= {name: value for name, value in vars(base).items() if not name.startswith("_")}
    settings = {field.name for field in fields(cls)} if is_dataclass(cls) else set()
    for name, value in sorted(found.items()):
        inner = getattr(value, "__func__", value)
        if inspect.isfunction(inner):
            yield f"    {name}{signature(inner)}"
        elif name not in settings:
            yield f"    {name}"


def text() -> str:
    """The whole interface: one line per name."""
    lines = []
    for module in MODULES:
        lines.append(f"# {module}")
        seen_elsewhere = module != "mtl_dist.weighting.base"
        for name, value in public_names(module):
            if inspect.isclass(value) and issubclass(value, Enum):
                lines.append(f"class {name}: {', '.join(value.__members__)}")
            elif inspect.isclass(value):
                lines.append(f"class {name}{signature(value) if not issubclass(value, Exception) else ''}")
                # the members of a class stand where it is defined, or first exported
                if seen_elsewhere and "weighting" in value.__module__ and name not in ("Rule", "Combinator"):
                    continue
                lines += members(value)
            elif callable(value):
                lines.append(f"def {name}{signature(value)}")
            else:
                lines.append(f"{name}: {type(value).__name__}")
    return "\n".join(lines) + "\n"


def test_the_public_interface_is_the_one_on_file():
    got, kept = text().splitlines(), FILE.read_text("utf-8").splitlines()
    gone = [line for line in kept if line not in got]
    new = [line for line in got if line not in kept]
    assert got == kept, (
        "the public interface changed; CONTRIBUTING.md says what a change needs, then renew the file with "
        f"`python -m tests.test_public_api`\ngone: {gone}\nnew: {new}"
    )


def test_the_file_has_what_users_import():
    kept = FILE.read_text("utf-8")
    for line in (
        "class Balancer(tasks: Sequence[str], weighting: Rule, *, ",
        "class MGDA(",
        "def check_rule(",
    ):
        assert f"\n{line}" in kept, line
    assert "object at 0x" not in kept


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")

"""A rule outside the library needs public names only, and rules inside it use the same ones."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

from mtl_dist import solvers, weighting
from mtl_dist.weighting import adam, base, checks, helpers

ROOMS = [Path(room.__file__).parent for room in (solvers, weighting)]
FILES = sorted(path for room in ROOMS for path in room.rglob("*.py"))
RULE_FILES = sorted(
    {Path(inspect.getfile(cls)) for cls in (*weighting.RULES.values(), *weighting.COMBINATORS.values())}
)


def imported(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every `from mtl_dist... import ...` in a file."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module.startswith("mtl_dist")]
    return [(node.module, alias.name) for node in ours for alias in node.names]


def test_every_module_is_public():
    assert [path for path in FILES if path.stem.startswith("_") and path.stem != "__init__"] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_no_private_name_is_imported(path):
    assert [name for _, name in imported(path) if name.startswith("_")] == []


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.stem)
def test_rules_import_solvers_from_the_package(path):
    assert {module for module, _ in imported(path) if "solvers" in module} <= {"mtl_dist.solvers"}


@pytest.mark.parametrize("module", [solvers, adam, base, checks, helpers], ids=lambda module: module.__name__)
def test_every_public_function_is_documented(module):
    names = getattr(module, "__all__", [name for name in vars(module) if not name.startswith("_")])
    functions = [getattr(module, name) for name in names if inspect.isfunction(getattr(module, name))]
    for function in functions:
        assert inspect.getdoc(function), function

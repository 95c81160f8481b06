"""The rooms of the design, and what each may import: downwards only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mtl_dist"
CORE = {
    "stats",
    "weighting",
    "sync",
    "probes",
    "balancer",
    "_alarm",
    "_check",
    "_course",
    "_diagonal",
    "_engine",
    "_explain",
    "_explicit",
    "_findings",
    "_graph",
    "_layout",
    "_quench",
    "_step",
    "_stopwatch",
    "_validate",
}
# room: the rooms it may import, besides itself
ALLOWED: dict[str, set[str]] = {
    "_stopwatch": set(),
    "stats": {"_stopwatch"},
    "weighting": {"stats"},
    "_layout": {"stats"},
    "sync": {"stats", "_layout", "_stopwatch"},
    "probes": {"stats", "_graph", "_layout"},
    "_alarm": set(),
    "_graph": set(),
    "_engine": set(),
    "_course": {"stats", "weighting", "_engine", "_stopwatch"},
    "_diagonal": {"stats"},
    "_quench": {"_graph"},
    "_findings": set(),
    "_explicit": {"stats", "probes"},
    "_check": {"stats", "probes", "weighting", "_explicit", "_findings"},
    "_explain": {"stats", "_layout", "weighting"},
    "_step": CORE - {"balancer"},
    "_validate": {"probes"},
    "balancer": CORE,
    "checkpoint": CORE,
    "virtual": CORE,
    "priors": {"stats", "sync"},
    "integrations": CORE | {"checkpoint", "tracking"},
    "tracking": {"stats"},
    "recipes": CORE | {"priors"},
    "training": CORE | {"virtual", "integrations", "recipes", "tracking"},
    "train": {"tracking", "training"},
    "commands": {"tracking", "weighting"},
    "doctor": CORE | {"virtual", "integrations"},
    "cli": {"commands", "doctor", "train", "weighting"},
    "__init__": CORE,
}
COLLECTIVES = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all"),
    *(
        "broadcast",
        "broadcast_object_list",
        "gather",
        "new_group",
        "reduce_scatter",
        "reduce_scatter_single",
        "reduce_scatter_tensor",
        "scatter",
        "send",
        "recv",
    ),
}


def modules() -> Iterator[tuple[str, Path, ast.Module]]:
    """(room, path, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        yield room, path, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a module imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_imported(tree: ast.AST) -> set[str]:
    parts = (name.split(".") for name in imports(tree))
    return {part[1] for part in parts if part[0] == "mtl_dist" and len(part) > 1}


def collectives_named(tree: ast.AST) -> set[str]:
    """Collectives that a module calls as an attribute of something, `dist.all_reduce(...)`."""
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {f.attr for f in called if isinstance(f, ast.Attribute)} & COLLECTIVES


def test_every_room_is_listed() -> None:
    assert {room for room, _, _ in modules()} == set(ALLOWED), "a new room says here what it may import"


def test_rooms_import_downwards_only() -> None:
    known = set(ALLOWED)
    for room, path, tree in modules():
        upwards = (rooms_imported(tree) & known) - ALLOWED[room] - {room}
        assert not upwards, f"{path} imports {sorted(upwards)}"


def test_there_is_no_cycle() -> None:
    settled: set[str] = set()
    while len(settled) < len(ALLOWED):
        ready = {room for room, below in ALLOWED.items() if below - {room} <= settled} - settled
        assert ready, f"cycle among {set(ALLOWED) - settled}"
        settled |= ready


def test_one_file_names_collectives() -> None:
    for room, path, tree in modules():
        if room != "sync":
            assert not collectives_named(tree), (
                f"{path} calls {collectives_named(tree)}: that belongs in sync.py"
            )


def test_rules_know_no_model_and_no_ranks() -> None:
    for room, path, tree in modules():
        if room == "weighting":
            forbidden = {name for name in imports(tree) if name.startswith(("torch.distributed", "torch.nn"))}
            assert not forbidden, f"{path} imports {forbidden}"


def test_the_checks_can_fail() -> None:
    bad = ast.parse("import torch.distributed as dist\nfrom mtl_dist.train import main\ndist.all_reduce(x)")
    assert rooms_imported(bad) == {"train"}
    assert collectives_named(bad) == {"all_reduce"}
    assert "torch.distributed" in set(imports(bad))


def test_the_library_imports_no_framework() -> None:
    heavy = {"accelerate", "deepspeed", "transformers", "wandb", "sklearn", "pydantic"}
    check = "import sys, mtl_dist, mtl_dist.weighting, mtl_dist.priors; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=PACKAGE.parent, stdout=subprocess.PIPE, check=True
    )
    assert not heavy & set(done.stdout.decode().split())

"""The rooms: what each imports, what only one of them may name, and the page that shows them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mtl_dist"
ARCHITECTURE = PACKAGE.parent / "docs" / "architecture.md"
# Room: the rooms that it imports, and no more. Rooms stand below those that import them.
ALLOWED: dict[str, set[str]] = {
    "canonical": set(),
    "durable": set(),
    "stats": set(),
    "solvers": set(),
    "weighting": {"canonical", "stats", "solvers"},
    "sync": {"stats"},
    "losses": {"stats"},
    "engines": {"losses"},
    "probes": {"canonical", "stats", "sync", "losses", "engines"},
    "checks": {"stats", "weighting", "sync", "losses", "engines", "probes"},
    "balancer": {"canonical", "stats", "weighting", "sync", "losses", "engines", "probes", "checks"},
    "virtual": {"sync", "balancer"},
    "checkpoint": {"durable", "stats", "balancer"},
    "testing": {"canonical", "stats", "weighting"},
    "priors": {"sync"},
    "grouping": set(),
    "tracking": {"durable", "grouping", "stats"},
    "integrations": {"stats", "engines", "losses", "probes", "sync", "balancer", "checkpoint", "tracking"},
    "recipes": {"canonical", "stats"},
    "training": {
        "canonical",
        "durable",
        "stats",
        "weighting",
        "probes",
        "balancer",
        "virtual",
        "integrations",
        "recipes",
        "tracking",
    },
    "train": {"integrations", "tracking", "training"},
    "doctor": {"stats", "weighting", "sync", "balancer", "virtual", "integrations", "training"},
    "commands": {"grouping", "tracking", "weighting"},
    "cli": {"commands", "doctor", "train"},
    "__init__": {"stats", "weighting", "engines", "probes", "checks", "balancer"},
}
COLLECTIVES = {
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "new_group",
    "recv",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
    "scatter",
    "send",
}
# Insides of engines: attributes and types without a public promise
ENGINE_INSIDES = re.compile(
    r"\b(ds_\w+|_fsdp\w*|_get_fsdp\w*|FSDP\w*State|fully_shard|DTensor|full_tensor|RegisterPostBackward\w*"
    r"|reshard_after_backward|torch_autocast_\w+|zero_optimization_\w+)\b"
)
MAY_IMPORT = {"solvers": {"numpy", "torch"}}  # outside the standard library


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


def private_imports(tree: ast.AST, room: str) -> set[str]:
    """Private modules and names of other rooms that a module imports."""
    names = (name for name in imports(tree) if name.startswith("mtl_dist."))
    found = (name for name in names if any(re.match(r"_[a-z]", part) for part in name.split(".")))
    return {name for name in found if name.split(".")[1] != room}


def collectives_named(tree: ast.AST) -> set[str]:
    """Collectives that a module calls as an attribute of `dist`, or of torch.distributed."""
    called = {node.func for node in ast.walk(tree) if isinstance(node, ast.Call)}
    attributes = {f for f in called if isinstance(f, ast.Attribute)}
    return {f.attr for f in attributes if ast.unparse(f.value) in ("dist", "torch.distributed")} & COLLECTIVES


def insides_named(tree: ast.AST) -> set[str]:
    """Insides of engines that the code names; docstrings and comments may speak of them."""
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    words: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            words.append(node.attr)
        elif isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words += [node.value] if node.value.isidentifier() else []
    return {word for word in words if ENGINE_INSIDES.fullmatch(word)}


def test_every_room_is_listed() -> None:
    assert {room for room, _, _ in modules()} == set(ALLOWED), "a new room says here what it may import"


def test_rooms_import_what_is_listed_and_no_more() -> None:
    imported: dict[str, set[str]] = {room: set() for room in ALLOWED}
    for room, path, tree in modules():
        found = (rooms_imported(tree) & set(ALLOWED)) - {room}
        assert found <= ALLOWED[room], f"{path} imports {sorted(found - ALLOWED[room])}"
        imported[room] |= found
    unused = {room: ALLOWED[room] - found for room, found in imported.items() if ALLOWED[room] - found}
    assert not unused, f"allowed, and not imported: {unused}"


def test_there_is_no_cycle() -> None:
    settled: set[str] = set()
    while len(settled) < len(ALLOWED):
        ready = {room for room, below in ALLOWED.items() if below <= settled} - settled
        assert ready, f"cycle among {set(ALLOWED) - settled}"
        settled |= ready


def test_modules_of_a_room_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, path, tree in modules():
        name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        graph[name] = set(imports(tree))
    names = set(graph)
    graph = {name.removesuffix(".__init__"): found & names for name, found in graph.items()}
    settled: set[str] = set()
    while len(settled) < len(graph):
        ready = {name for name, below in graph.items() if below - {name} <= settled} - settled
        assert ready, f"a circle among {sorted(set(graph) - settled)}"
        settled |= ready


def test_nothing_private_stands_at_the_top_or_is_imported_by_another_room() -> None:
    loose = [path.name for path in PACKAGE.glob("_*.py") if not path.name.startswith("__")]
    assert not loose, f"private modules belong into a room: {loose}"
    for room, path, tree in modules():
        assert not private_imports(tree, room), f"{path} imports {private_imports(tree, room)}"


def test_only_sync_names_collectives() -> None:
    for room, path, tree in modules():
        if room != "sync":
            assert not collectives_named(tree), (
                f"{path} calls {collectives_named(tree)}: that belongs in sync/"
            )


def test_only_engines_names_the_insides_of_engines() -> None:
    for room, path, tree in modules():
        if room != "engines":
            assert not insides_named(tree), f"{path} names {insides_named(tree)}: that belongs in engines/"


def test_rules_know_no_model_and_no_ranks() -> None:
    for room, path, tree in modules():
        if room in ("weighting", "solvers"):
            forbidden = {name for name in imports(tree) if name.startswith(("torch.distributed", "torch.nn"))}
            assert not forbidden, f"{path} imports {forbidden}"


def test_rooms_with_few_needs_import_no_other_package() -> None:
    for room, path, tree in modules():
        if room in MAY_IMPORT:
            packages = {name.split(".")[0] for name in imports(tree)} - set(sys.stdlib_module_names)
            assert packages <= MAY_IMPORT[room] | {"mtl_dist"}, f"{path} imports {packages}"


def test_public_signatures_name_public_things() -> None:
    import mtl_dist

    for name in ("Engine", "Finding", "OnNonfinite", "Elapsed", "StepReport", "TaskStats"):
        assert name in mtl_dist.__all__, f"{name} stands in a public signature"


def test_the_page_shows_the_rooms_as_they_are() -> None:
    """docs/architecture.md lists every room with what it imports, as the code does."""
    rows = re.findall(
        r"^\| `([\w.]+?)/?(?:\.py)?` \|[^|]*\| ([^|]*) \|$", ARCHITECTURE.read_text("utf-8"), re.MULTILINE
    )
    shown = {room: set(re.findall(r"\w+", below.replace("nothing", ""))) for room, below in rows}
    assert shown == {room: below for room, below in ALLOWED.items() if room != "__init__"}


def test_the_checks_can_fail() -> None:
    bad = ast.parse(
        "import torch.distributed as dist\nfrom mtl_dist.train import main\n"
        "from mtl_dist.probes._x import y\ndist.all_reduce(x)\nhasattr(p, 'ds_status')\np.full_tensor()"
    )
    assert rooms_imported(bad) == {"train", "probes"}
    assert private_imports(bad, "sync") == {"mtl_dist.probes._x", "mtl_dist.probes._x.y"}
    assert not private_imports(bad, "probes")
    assert collectives_named(bad) == {"all_reduce"}
    assert insides_named(bad) == {"ds_status", "full_tensor"}
    assert "torch.distributed" in set(imports(bad))


def test_the_library_imports_no_framework() -> None:
    heavy = {"accelerate", "deepspeed", "transformers", "wandb", "sklearn", "pydantic"}
    check = "import sys, mtl_dist, mtl_dist.weighting, mtl_dist.priors; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", check], cwd=PACKAGE.parent, stdout=subprocess.PIPE, check=True
    )
    assert not heavy & set(done.stdout.decode().split())

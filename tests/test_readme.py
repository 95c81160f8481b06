"""The documentation is true: its code runs, its table of rules is the registry, its links exist."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import warm
from program import ROOT

from mtl_dist import COMBINATORS, RULES

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    )
}
RULES_PAGE = ROOT / "docs" / "rules.md"
TEXT = "\n".join(PAGES.values())


def rules_table() -> str:
    """The table of rules in docs/rules.md. To renew it: `PYTHONPATH=tests python -m tests.test_readme`."""
    reads = {name: rule.needs.name.lower() for name, rule in sorted(RULES.items())}
    reads |= dict.fromkeys(sorted(COMBINATORS), "as its rule")
    lines = ["| class | name | reads | what it does |", "|---|---|---|---|"]
    for name, what in reads.items():
        cls = {**RULES, **COMBINATORS}[name]
        first = inspect.getdoc(cls).partition("\n")[0].replace("|", "\\|")
        lines.append(f"| `{cls.__name__}` | `{name}` | {what} | {first} |")
    return "\n".join(lines)


def program(page: str) -> tuple[str, list[str]]:
    """Of a page: one program (hidden preparation, then its Python blocks), and the blocks that cannot run.

    Blocks with a title are files: `tests/test_writing.py` runs them.
    """
    found = re.findall(r"<!-- run first:\n(.*?)-->|```python( no-run)?\n(.*?)```", page, flags=re.DOTALL)
    runs = [first or block for first, no_run, block in found if not no_run]
    return "\n\n".join(runs), [block for _, no_run, block in found if no_run]


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links() -> list[tuple[str, str]]:
    """(page, target) of every relative link and picture."""
    return [
        (name, target)
        for name, page in PAGES.items()
        for target in re.findall(r"\]\(([^)\s]+)\)", page)
        if not target.startswith("http")
    ]


def test_rules_table_is_the_registry() -> None:
    page = RULES_PAGE.read_text(encoding="utf-8")
    assert rules_table() in page, "renew it: PYTHONPATH=tests python -m tests.test_readme"


def test_the_numbers_of_rules_are_right() -> None:
    assert f"with {len(RULES)} weighting rules" in README
    assert f"all {len(RULES)} weighting rules and {len(COMBINATORS)} combinators" in README


@pytest.mark.parametrize("num_processes", [1, 2])
def test_example_runs(tmp_path: Path, num_processes: int) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    check = f"\nassert accelerator.num_processes == {num_processes}, accelerator.num_processes\n"
    # the model goes before its process group: see mtl_dist/train.py
    leave = "del net, model, optimizer\naccelerator.free_memory()\naccelerator.end_training()\n"
    script.write_text(example + check + leave, encoding="utf-8")
    done = warm.launch(script, num_processes, env={"PYTHONPATH": str(ROOT)}, modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr
    assert re.search(r"'parity': 0\.\d+, 'size': 0\.\d+", done.stdout), done.stdout
    assert done.stdout.count("parity") == 1, "printed once, by the main process"


def test_the_front_page_is_short() -> None:
    assert len(README.encode()) <= 10_000


def test_example_is_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    body = example[example.index("accelerator = ") :]
    code = [line for line in body.splitlines() if line.strip(" })") and not line.strip().startswith("#")]
    assert len(code) <= 20


@pytest.mark.parametrize(
    "name", [name for name in PAGES if name.startswith("docs/") and program(PAGES[name])[0]]
)
def test_the_blocks_of_a_page_run(tmp_path: Path, name: str) -> None:
    """One after another, in one process, after the page's hidden preparation."""
    script = tmp_path / "page.py"
    strict = "import warnings\nwarnings.filterwarnings('error', '', UserWarning, 'mtl_dist')\n"
    script.write_text(strict + program(PAGES[name])[0], encoding="utf-8")
    done = warm.launch(script, 1, env={"PYTHONPATH": str(ROOT)}, modules=warm.TRAINING)
    assert done.returncode == 0, done.stderr


def test_blocks_that_do_not_run_are_python_and_few() -> None:
    blocks = [block for page in PAGES.values() for block in program(page)[1]]
    for block in blocks:
        ast.parse(block)
    assert len(blocks) <= 4, "a block that can run must run"


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"(?<![\w/])(?:launch|configs|benchmarks|mtl_dist|docs)/[\w./]+\w", TEXT)))
)
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists(), path


@pytest.mark.parametrize(("name", "target"), links())
def test_links_lead_somewhere(name: str, target: str) -> None:
    path, _, anchor = target.partition("#")
    page = (ROOT / name).parent / path if path else ROOT / name
    assert page.exists(), target
    if anchor:
        assert anchor in anchors(page.read_text(encoding="utf-8")), target


def test_the_chinese_page_has_the_same_example() -> None:
    blocks = [re.sub(r"  # .*", "", program(PAGES[name])[0]) for name in ("README.md", "docs/zh/README.md")]
    assert blocks[0] == blocks[1]


def test_every_page_is_in_both_indexes() -> None:
    for name in PAGES:
        if name.startswith("docs/") and name != "docs/README.md":
            assert f"({name})" in README, name
            assert f"({name.removeprefix('docs/')})" in PAGES["docs/README.md"], name


def test_the_checks_can_fail() -> None:
    page = "<!-- run first:\nx = 1\n-->\n```python\ny = x\n```\n```python no-run\nz(\n```\n# A `b`, c: d\n"
    assert program(page) == ("x = 1\n\n\ny = x\n", ["z(\n"])
    assert anchors(page) == {"a-b-c-d"}


if __name__ == "__main__":
    text = RULES_PAGE.read_text(encoding="utf-8")
    text = re.sub(r"\| class \| name \| reads .*?(?=\n\n)", lambda _: rules_table(), text, flags=re.DOTALL)
    RULES_PAGE.write_text(text, encoding="utf-8")

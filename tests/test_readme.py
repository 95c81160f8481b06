"""The README is true: its example runs, its table is the registry, its commands exist."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
from program import ROOT, run

from mtl_dist import COMBINATORS, RULES

README = (ROOT / "README.md").read_text(encoding="utf-8")


def rules_table() -> str:
    """The README's table of rules. To renew it: `PYTHONPATH=tests python -m tests.test_readme`."""
    reads = {name: rule.needs.name.lower() for name, rule in sorted(RULES.items())}
    reads |= dict.fromkeys(sorted(COMBINATORS), "as its rule")
    lines = ["| class | name | reads | what it does |", "|---|---|---|---|"]
    for name, what in reads.items():
        cls = {**RULES, **COMBINATORS}[name]
        first = inspect.getdoc(cls).partition("\n")[0].replace("|", "\\|")
        lines.append(f"| `{cls.__name__}` | `{name}` | {what} | {first} |")
    return "\n".join(lines)


def test_rules_table_is_the_registry() -> None:
    assert rules_table() in README, "renew it: PYTHONPATH=tests python -m tests.test_readme"


@pytest.mark.parametrize("num_processes", [1, 2])
def test_example_runs(tmp_path: Path, num_processes: int) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    script = tmp_path / "example.py"
    check = f"\nassert accelerator.num_processes == {num_processes}, accelerator.num_processes\n"
    # the model goes before its process group: see mtl_dist/train.py
    leave = "del net, model, optimizer\naccelerator.free_memory()\naccelerator.end_training()\n"
    script.write_text(example + check + leave, encoding="utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), script]
    done = run(*command, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    assert re.search(r"'parity': 0\.\d+, 'size': 0\.\d+", done.stdout), done.stdout
    assert done.stdout.count("parity") == 1, "printed once, by the main process"


def test_example_is_short() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    body = example[example.index("accelerator = ") :]
    code = [line for line in body.splitlines() if line.strip(" })") and not line.strip().startswith("#")]
    assert len(code) <= 20


@pytest.mark.parametrize("path", re.findall(r"(?:launch|configs|benchmarks|mtl_dist)/[\w./]+\w", README))
def test_paths_exist(path: str) -> None:
    assert (ROOT / path).exists(), path


if __name__ == "__main__":
    text = re.sub(r"\| class \| name \| reads .*?(?=\n\n)", lambda _: rules_table(), README, flags=re.DOTALL)
    (ROOT / "README.md").write_text(text.replace("RULES_TABLE", rules_table()), encoding="utf-8")

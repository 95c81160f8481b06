"""docs/writing.md is enough: a rule and a recipe outside the library, from nothing but its blocks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import warm
from program import BIN, ROOT

PAGE = (ROOT / "docs" / "writing.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r'```\w+ title="([^"]+)"\n(.*?)```', PAGE, flags=re.DOTALL))
ENV = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a stranger has put the files of the page."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def train(folder: Path, num_processes: int, *arguments: str) -> CompletedProcess[str]:
    """`python -m mtl_dist.train` in the stranger's folder."""
    return warm.launch(
        "mtl_dist.train", num_processes, *arguments, env=ENV, modules=warm.TRAINING, cwd=folder
    )


def test_the_rule_keeps_the_laws(folder):
    options = ("-q", "-p", "no:cacheprovider", "test_my_rules.py")
    done = warm.launch("pytest", 1, *options, env=ENV, modules=warm.TRAINING, cwd=folder)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout


def test_it_trains_on_two_processes_and_resumes(folder):
    for steps, line in zip((20, 40), FILES["train.sh"].splitlines(), strict=True):
        settings = line.removeprefix("torchrun --standalone --nproc_per_node 2 -m mtl_dist.train ")
        assert settings != line
        done = train(folder, 2, *settings.split())
        assert done.returncode == 0, done.stderr
        said = f"{steps} steps, 2 process(es) on cpu, weighting Largest(power=2.0)"
        assert done.stdout.count(said) == 1
    rows = [json.loads(line) for line in (folder / "runs/spots/metrics.jsonl").read_text().splitlines()]
    assert [row["train/global_step"] for row in rows] == [*range(1, 41)], "the second run went on"
    assert rows[-1]["eval/where/rmse"] < rows[19]["eval/where/rmse"], "and it learns"
    for name in ("weighting.power=3.0", "recipe.size=12"):
        other = train(folder, 1, "--check", "spots.yaml", "resume_from=latest", name)
        assert other.returncode == 2
        assert "restore the setting" in other.stderr


def test_the_console_command_finds_the_files_too(folder):
    """`mtl-dist` does not have the working folder on its path by itself."""
    program, check = ROOT / "tests" / "console.py", ("train", "--check", folder / "spots.yaml")
    done = warm.launch(program, 1, *check, env=ENV, modules=warm.TRAINING, cwd=BIN)
    assert done.returncode == 0, done.stderr


def test_the_page_shows_all_files():
    assert set(FILES) == {"my_rules.py", "test_my_rules.py", "my_tasks.py", "spots.yaml", "train.sh"}


def test_the_page_names_every_law_and_every_fact():
    from mtl_dist.testing import LAWS
    from mtl_dist.weighting import Rule

    first_cells = re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    start = first_cells.index(next(iter(LAWS)))
    assert first_cells[start : start + len(LAWS)] == [*LAWS]
    facts = set(Rule.__annotations__) - {"name", "paper", "cost"}
    assert facts <= set(first_cells)

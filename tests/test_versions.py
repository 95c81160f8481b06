"""`bash launch/versions.sh`, the tests with every version of torch: environments, table, docs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from program import ROOT

from benchmarks import versions

PROJECT = """
[project]
dependencies = ["torch>=2.9", "numpy>=2.0"]
[project.optional-dependencies]
deepspeed = ["deepspeed>=0.18.4", "transformers>=5.0"]
transformers = ["transformers>=5.0,<6"]
recipes = ["scikit-learn>=1.5"]
"""
REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good[zero-2: x]"/>
<testcase classname="tests.a" name="good[ddp: x]"/>
<testcase classname="tests.a" name="bad[zero-3: x]"><failure message="b differ">trace</failure></testcase>
<testcase classname="tests.a" name="left out[accelerate zero-2]"><skipped message="no GPU"/></testcase>
<testcase classname="tests.a" name="left out[zero-2]"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.b"><error message="collection"/></testcase>
</testsuite></testsuites>"""


def found(**others: Any) -> dict[str, Any]:
    return {"passed": 0, "skipped": 0, "failed": {}, "cannot": {}, **others}


def test_the_first_row_has_the_lower_bounds_of_the_project() -> None:
    assert versions.lower_bounds(PROJECT) == [
        *("torch==2.9", "numpy==2.0", "deepspeed==0.18.4", "transformers==5.0", "scikit-learn==1.5")
    ]
    real = versions.requirements(versions.LOWER_BOUNDS)
    assert "torch==2.9" in real
    assert all("==" in requirement for requirement in real[: -len(versions.TOOLS)]), real


def test_every_other_row_pins_what_the_table_shows() -> None:
    for version, pins in versions.PINS.items():
        assert [pin.split("==")[0] for pin in pins] == list(versions.SHOWN[:4]), version
        assert pins[0].startswith(f"torch=={version}.")


def test_a_part_names_files_that_exist() -> None:
    assert all((ROOT / path).exists() for part in versions.PARTS.values() for path in part.tests)


def test_a_report_is_counted() -> None:
    part = versions.Part(("tests/a.py", "tests/b.py"), "(zero or tests.b) and not accelerate")
    assert versions.counts(REPORT, part) == {
        "passed": 1,
        "skipped": 1,
        "failed": {"tests.a::bad[zero-3: x]": "b differ", "tests.b::": "collection"},
        "cannot": {},
    }
    assert versions.counts(REPORT, versions.Part(("tests/a.py",), "ddp"))["passed"] == 1
    assert versions.counts(REPORT, versions.Part(("tests/c.py",)))["passed"] == 0


def test_what_the_engine_itself_cannot_run_has_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "ENGINES_OWN", {"b differ": "this engine"})
    result = versions.counts(REPORT, versions.Part(("tests/a.py",)))
    assert (result["failed"], result["cannot"]) == ({}, {"b differ": 1})
    assert versions.entry(result) == "2, 2 skipped, 1 impossible (1)"
    results = {"2.9": {"parts": {"core": result}}}
    assert versions.notes(results).startswith("(1) this engine: `b differ`.")
    assert versions.notes({"2.9": {"parts": {"core": found()}}}) == ""


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (None, "not run yet"),
        (found(passed=3), "3"),
        (found(passed=3, skipped=1), "3, 1 skipped"),
        (found(passed=3, failed={"a": ""}), "**1 failed**"),
        (found(), "**nothing ran**"),
        ({"impossible": "ImportError: no"}, "impossible: ImportError: no"),
    ],
)
def test_no_cell_is_empty(result: dict[str, Any] | None, shown: str) -> None:
    assert versions.entry(result) == shown


def test_a_part_runs_and_a_missing_module_is_its_reason() -> None:
    part = versions.Part(("tests/test_project.py",), "forms", "yaml")
    missing = versions.Part(part.tests, "", "no_such_module")
    result = versions.run_parts(Path(sys.executable), {"one": part, "two": missing})
    assert result["one"]["failed"] == {}, result
    assert result["one"]["passed"] > 0
    assert result["two"] == {"impossible": "ModuleNotFoundError: No module named 'no_such_module'"}


def test_too_little_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "FREE_GB", 10**9)
    with pytest.raises(SystemExit, match=r"^error: \d+ GB are free in .*give --remove"):
        versions.make_environment(tmp_path / "2.9", ["torch==2.9"])


def test_what_pip_cannot_install_together_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "FREE_GB", 0)
    answers = iter([(0, ""), (1, "Collecting\nERROR: Cannot install a==1 and b==2\nERROR: more")])

    def answer(command: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        (tmp_path / "2.9").mkdir(exist_ok=True)
        status, said = next(answers)
        return subprocess.CompletedProcess(command, status, "", said)

    monkeypatch.setattr(versions.subprocess, "run", answer)
    with pytest.raises(SystemExit, match=r"^error: ERROR: Cannot install a==1 and b==2"):
        versions.make_environment(tmp_path / "2.9", ["a==1"])


def test_the_docs_have_the_table_that_was_measured() -> None:
    results = json.loads((versions.RESULTS / "versions.json").read_text(encoding="utf-8"))
    table = versions.table(results)
    assert table.count("\n") == len(versions.VERSIONS) + 1
    assert "failed" not in table
    docs = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")
    assert table in docs
    assert versions.notes(results) in docs
    assert versions.page(results) == (versions.RESULTS / "versions.md").read_text(encoding="utf-8")

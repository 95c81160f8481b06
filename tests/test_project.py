"""What surrounds the code: the release check, the issue forms, the page for contributors."""

from __future__ import annotations

import re
import runpy

import yaml
from program import ROOT

RELEASE = runpy.run_path(str(ROOT / "launch" / "release.py"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_a_release_needs_one_version_and_a_date(tmp_path):
    (tmp_path / "mtl_dist").mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "0.2.0"\n')
    (tmp_path / "mtl_dist" / "__init__.py").write_text('__version__ = "0.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## Unreleased\n\n## 0.2.0 - 2026-12-01\n")
    assert RELEASE["problems"]("v0.2.0", tmp_path) == []
    assert RELEASE["problems"]("v0.2", tmp_path) == [
        "the tag is v0.2, but pyproject.toml has the version 0.2.0"
    ]
    (tmp_path / "mtl_dist" / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("## 0.2.0\n")
    assert len(RELEASE["problems"]("v0.2.0", tmp_path)) == 2


def test_the_package_and_the_project_have_one_version():
    assert not [text for text in RELEASE["problems"]("v0.1.0") if "CHANGELOG" not in text]


def test_the_issue_forms_are_forms():
    assert len(FORMS) == 4
    for path in FORMS:
        form = yaml.safe_load(path.read_text("utf-8"))
        if path.stem == "config":
            assert form["blank_issues_enabled"] is False
            continue
        assert {"name", "description", "body"} <= set(form)
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids))
        assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_the_workflows_stop_and_ask_for_no_secret():
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text("utf-8")
        for name, job in yaml.safe_load(text)["jobs"].items():
            assert job["timeout-minutes"] <= 45, (path.name, name)
        assert "secrets." not in text


def test_the_page_for_contributors_names_files_that_exist():
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    paths = re.findall(r"(?:launch|tests|docs|configs|mtl_dist|\.github|\.ci)/[\w./]*\w", page)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path

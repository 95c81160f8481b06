"""The report's file: what is in it, what it says about damaged runs, and that nothing in it can break out."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hatchling.builders.wheel import WheelBuilder
from hypothesis import given
from hypothesis import strategies as st

from mtl_dist.cli import main
from mtl_dist.tracking.keys import STEP_KEY, possible
from mtl_dist.tracking.report import write_report
from mtl_dist.tracking.report.page import render
from mtl_dist.tracking.report.panels import cosine_keys, make_panels, metrics_of, tasks_of, with_shares
from mtl_dist.tracking.report.read import RunData, read_runs, unique_names
from mtl_dist.tracking.report.tables import describe, flatten
from mtl_dist.tracking.report.thin import Buckets
from tests.program import ROOT
from tests.tracking.made_runs import made_row, write_run

TASKS = ("left", "right", "sum")
EVIL = "<script>alert(1)</script>"


def in_memory(num_rows: int, tasks: tuple[str, ...], name: str = "run", seed: int = 0) -> RunData:
    """A run of noise, without its file."""
    generator = np.random.default_rng(seed)
    columns = {
        key: generator.uniform(0.1, 1, num_rows).astype(np.float32)
        for key in made_row(tasks, 1, 1)
        if key != "train/global_step"
    }
    return RunData(name, np.arange(1.0, num_rows + 1), columns, {"weighting": "mgda"}, 1, "", ())


def data_of(page: str) -> dict:
    """The numbers in the page."""
    return json.loads(re.search(r'id="data">(.*?)</script>', page)[1])


def values(text: str, kind: str = "<f4") -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_every_value_of_a_short_run_is_in_the_page(tmp_path):
    write_run(tmp_path / "a", TASKS, 30, settings={})
    (run,) = data_of(write_report([tmp_path / "a"]).read_text())["runs"]
    losses = run["series"]["mtl/loss/sum"]
    np.testing.assert_array_equal(values(run["grids"][losses["x"]], "<f8"), np.arange(1, 31))
    expected = [made_row(TASKS, step, 30)["mtl/loss/sum"] for step in range(1, 31)]
    np.testing.assert_allclose(values(losses["v"]), expected, rtol=1e-6)
    cosines = values(run["cosines"]["v"], "<i2").reshape(30, 3) / 1e4
    expected = [made_row(TASKS, step, 30)["mtl/cosine/left__sum"] for step in range(1, 31)]
    np.testing.assert_allclose(cosines[:, run["cosines"]["pairs"].index([0, 2])], expected, atol=1e-4)
    sparse = run["series"]["eval/left/accuracy"]
    np.testing.assert_array_equal(values(run["grids"][sparse["x"]], "<f8"), [6, 12, 18, 24, 30])


def test_contributions_are_shares_whatever_the_rows_hold(tmp_path):
    write_run(tmp_path / "a", TASKS, 5, settings={})
    (run,) = with_shares(read_runs([tmp_path / "a"]))
    shares = np.stack([run.columns[f"mtl/contribution/{task}"] for task in TASKS])
    np.testing.assert_allclose(shares.sum(0), 1, rtol=1e-6)
    (again,) = with_shares([run])
    np.testing.assert_allclose(again.columns["mtl/contribution/sum"], shares[2], rtol=1e-6)


def test_same_input_same_bytes(tmp_path):
    folders = [write_run(tmp_path / name, TASKS, 12, settings={"seed": 0}) for name in ("a", "b")]
    first = write_report(folders, tmp_path / "first.html").read_bytes()
    assert write_report(folders, tmp_path / "second.html").read_bytes() == first


def test_only_its_own_scripts_may_run_and_nothing_may_be_asked_for(tmp_path):
    page = write_report([write_run(tmp_path / "a", TASKS, 5, settings={})]).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    assert (len(scripts), len(styles)) == (2, 1)
    for text in (*scripts, *styles):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert "unsafe" not in policy
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page)) == {"data:,"}
    assert "Permission is hereby granted" in page, "the licence of uPlot travels with its code"


def test_names_and_settings_are_escaped(tmp_path):
    tasks = (EVIL, '"quoted" & <b>', "</script><img src=x onerror=alert(2)>")
    folder = write_run(tmp_path / "<i>run", tasks, 5, settings={EVIL: {"x": "</td></script>"}, "b": "<!--"})
    page = write_report([folder]).read_text()
    assert page.count("<script") == 3
    assert page.count("</script>") == 3
    for text in (EVIL, "<img", "<i>run", "<!--", "</td></"):
        assert text not in page.replace("</td></tr>", "")
    assert data_of(page)["tasks"] == list(tasks)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_lone_surrogate_is_no_reason_to_fail(tmp_path):
    folder = write_run(tmp_path / "a", ("\ud800", "b"), 3, settings={"x": "\udfff"})
    assert write_report([folder]).stat().st_size > 0


def test_damaged_runs_are_told_in_words(tmp_path):
    folder = write_run(tmp_path / "a", TASKS, 4)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"train/global_step": 5, "mtl/loss/sum": null, "mtl/held": 1, "note": "x"}\n')
        file.write('{"train/global_step": 5, "eval/loss/sum": 3.5, "mtl/loss/left": NaN}\n')
        file.write('{"mtl/loss/sum": 1}\n{"train/global_step": 6, "mtl/lo')
    (folder / "summary.json").write_text("{")
    (run,) = read_runs([folder])
    assert run.steps.tolist() == [1, 2, 3, 4, 5]
    assert run.columns["eval/loss/sum"][-1] == 3.5, "rows of one step are one row"
    notes = " ".join(run.notes)
    for told in (
        "last row is incomplete",
        "1 rows without train/global_step",
        "mtl/loss/sum was not finite at 1 steps, first at step 5",
        "mtl/loss/left was not finite",
        "1 steps were held",
        "Not drawn, because not numbers: note",
        "summary.json is damaged",
    ):
        assert told in notes
    assert "last row is incomplete" in write_report([folder]).read_text()


@pytest.mark.parametrize(
    "value", [True, "5", "", None, math.nan, math.inf, -math.inf, 5.0, -5.0, 1e300, 10**400, [1.0], {"a": 1}]
)
def test_every_recorded_value_is_possible_or_told(tmp_path, value):
    """Of every column that a row can have: a number in its range, or a sentence that names the column."""
    for key in made_row(TASKS, 4, 4):
        folder = write_run(tmp_path / key.replace("/", "-"), TASKS, 4)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        lines[2] = json.dumps({**json.loads(lines[2]), key: value})
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (run,) = read_runs([folder])
        if key == STEP_KEY and value == 5.0:
            assert run.steps.tolist() == [1, 2, 4, 5]
        elif key == STEP_KEY:
            assert run.steps.tolist() == [1, 2, 4]
            assert any("1 rows without" in note and "line 3" in note for note in run.left_out)
        elif math.isfinite(read := run.columns[key][2]):
            low, high = possible(key)
            assert read == np.float32(value)
            assert low <= read <= high
        else:
            assert any(key in note for note in run.notes)
    assert write_report([folder]).stat().st_size > 0


@pytest.mark.parametrize("summary", ["[" * 100_000, "1" * 5000, '{"steps": tru', "[1]", "\x00"])
def test_a_damaged_summary_is_told(tmp_path, summary):
    folder = write_run(tmp_path / "a", TASKS, 4)
    (folder / "summary.json").write_text(summary)
    assert "summary.json is damaged" in write_report([folder]).read_text()


def test_an_empty_run_beside_a_full_one(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    full = write_run(tmp_path / "full", TASKS, 5, settings={})
    page = write_report([tmp_path / "empty", full], tmp_path / "out.html").read_text()
    assert "has no complete row: there is nothing to draw" in page
    assert "There is no summary.json" in page
    assert "has no complete row" in write_report([tmp_path / "empty"]).read_text()


def test_rows_out_of_order_are_sorted_and_later_ones_win(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            f'{{"train/global_step": {step}, "x": {x}}}\n' for step, x in [(1, 1), (3, 3), (2, 20), (3, 30)]
        )
    )
    (run,) = read_runs([tmp_path])
    assert run.steps.tolist() == [1, 2, 3]
    assert run.columns["x"].tolist() == [1, 20, 30]


def test_runs_with_different_tasks_and_settings(tmp_path):
    folders = [
        write_run(tmp_path / "a", ("left", "right"), 5, settings={"seed": 0, "weighting": {"name": "mgda"}}),
        write_run(tmp_path / "b", ("right", "sum"), 8, settings={"seed": 1, "weighting": {"name": "mgda"}}),
    ]
    page = write_report(folders, tmp_path / "out.html").read_text()
    assert data_of(page)["tasks"] == ["left", "right", "sum"]
    assert re.findall(r"<tr class=differs><td>(.*?)</td>", page) == ["seed"]
    assert "5 to 8 steps" in page
    assert page.count("<td>DEEPSPEED, ZeRO-2, cpu</td>") == 2


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no run folder"),
        (lambda folder: folder.mkdir(), "is not a run: it has no metrics.jsonl"),
        (
            lambda folder: write_run(folder, TASKS, 2).joinpath("metrics.jsonl").write_text("x\n{}\n"),
            "not JSON",
        ),
        (
            lambda folder: write_run(folder, TASKS, 2).joinpath("metrics.jsonl").write_text("[1]\n"),
            "not a row",
        ),
    ],
)
def test_what_is_not_a_run_is_an_error_with_status_2(tmp_path, capsys, prepare, message):
    prepare(tmp_path / "run")
    assert main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "out.html")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.html").exists()


def test_the_command_writes_where_it_is_told(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [str(write_run(tmp_path / name, TASKS, 3, settings={})) for name in ("a", "b")]
    assert main(["report", folders[0]]) == 0
    assert main(["report", *folders]) == 0
    assert main(["report", *folders, "-o", "new/all.html"]) == 0
    assert all(
        Path(name).stat().st_size > 50_000 for name in ("a/report.html", "report.html", "new/all.html")
    )
    assert re.search(r"wrote new/all.html \(\d+ kB\)", capsys.readouterr().out)
    assert main(["report", folders[0], "-o", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("runs", "rows", "tasks"), [(1, 100_000, 4), (3, 100_000, 3), (1, 5000, 50), (4, 1000, 50)]
)
def test_long_runs_and_many_tasks_stay_below_two_megabytes(runs, rows, tasks):
    names = tuple(f"task_{i}" for i in range(tasks))
    page = render([in_memory(rows, names, f"run{seed}", seed) for seed in range(runs)])
    assert len(page.encode()) < 2e6
    assert f"of the {rows} rows, " in page


@given(st.integers(1, 200), st.integers(3, 60), st.integers(0, 1000))
def test_thinning_keeps_ends_extremes_and_order(num_rows, most, seed):
    generator = np.random.default_rng(seed)
    column = generator.normal(size=num_rows).astype(np.float32)
    column[generator.random(num_rows) < 0.2] = np.nan
    buckets = Buckets.of(num_rows, most)
    assert len(buckets.starts) <= max(most, 1)
    kept, means = buckets.extremes(column), buckets.means(column)
    assert len(kept) == len(buckets.slots)
    np.testing.assert_equal([kept[0], kept[-1]], [column[0], column[-1]])
    if np.isfinite(column).any():
        assert (np.nanmin(kept), np.nanmax(kept)) == (np.nanmin(column), np.nanmax(column))
    for start, end, mean in zip(buckets.starts, buckets.ends, means, strict=True):
        inside = column[start : end + 1]
        finite = inside[np.isfinite(inside)]
        np.testing.assert_allclose(mean, finite.mean() if len(finite) else np.nan, rtol=1e-5, atol=1e-6)
        shown = kept[(buckets.slots >= start) & (buckets.slots <= end)]
        where = [np.flatnonzero(inside == value)[0] for value in shown if np.isfinite(value)]
        assert where == sorted(where), "a rise stays a rise"


def test_a_spike_in_a_long_run_is_drawn():
    run = in_memory(50_000, TASKS)
    run.columns["mtl/loss/sum"][31_234] = 1000
    shown = data_of(render([run]))["runs"][0]["series"]["mtl/loss/sum"]
    assert values(shown["v"]).max() == 1000
    assert len(values(shown["v"])) < 2000


def test_tasks_pairs_and_metrics_are_read_from_keys():
    tasks = ("a", "b__c", "loss")
    run = in_memory(3, tasks)
    assert tasks_of([run]) == tasks
    assert cosine_keys(run, tasks)[0, 1] == "mtl/cosine/a__b__c"
    keys = ["eval/loss/a", "eval/loss/loss", "eval/loss/accuracy", "eval/a/x", "eval/ghost/x"]
    assert metrics_of(keys, tasks) == [("eval/loss/accuracy", "loss", "accuracy"), ("eval/a/x", "a", "x")]
    others = {f"custom/{i}": np.ones(3, np.float32) for i in range(14)}
    run.columns.update(others)
    panels, left_out = make_panels([run], tasks)
    assert sum(panel.section == "Other" for panel in panels) == 12
    assert left_out == ["custom/12", "custom/13"]


def test_short_forms():
    assert unique_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert unique_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert (
        describe({"name": "smooth", "decay": 0.9, "rule": {"name": "mgda"}}) == "smooth(decay=0.9, rule=mgda)"
    )
    assert flatten({"a": {"b": None}, "c": {}, "d": [1, True]}) == {
        "a.b": "null",
        "c": "{}",
        "d": "[1, True]",
    }


def test_the_wheel_carries_the_assets(tmp_path):
    (built,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(built).namelist())
    assets = list((ROOT / "mtl_dist" / "tracking" / "report" / "assets").iterdir())
    assert len(assets) > 8
    assert {str(path.relative_to(ROOT)) for path in assets} <= names

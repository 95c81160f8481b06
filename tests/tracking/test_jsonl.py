"""Rows survive a kill, and a resumed run neither repeats nor loses one."""

from __future__ import annotations

import json
import math

import pytest

from mtl_dist.tracking import JsonlWriter, RowReader, read_rows


def write(path, steps, after_step=0):
    with JsonlWriter(path, after_step) as writer:
        for step in steps:
            writer.write({"train/global_step": step, "x": step / 3})


def steps(path):
    return [row["train/global_step"] for row in read_rows(path)]


def test_every_row_is_on_disk_when_write_returns(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write({"train/global_step": 1, "x": 0.1})
    assert read_rows(path) == [{"train/global_step": 1, "x": 0.1}]
    writer.close()
    writer.close()


def test_resume_drops_later_rows_and_the_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 8))
    path.write_text(path.read_text() + '{"train/global_step": 8, "x"')
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7]
    write(path, range(6, 9), after_step=5)
    assert steps(path) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    write(path, [1])
    assert steps(path) == [1]


def test_numbers_are_exact_and_the_file_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"train/global_step": 1, "third": 1 / 3, "nan": math.nan, "inf": -math.inf})
    row = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert row == {"train/global_step": 1, "third": 1 / 3, "nan": None, "inf": None}


def test_a_damaged_file_is_refused_with_its_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"train/global_step": 1}\nnot json\n{"train/global_step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        JsonlWriter(path, after_step=2)
    path.write_bytes(b'{"train/global_step": 1, "mtl/loss/\xff": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: not JSON"):
        read_rows(path)
    for step in ("true", '"1"', "-1", "0.5", "NaN"):  # no step that can be, and a whole row behind it
        path.write_text(f'{{"train/global_step": {step}}}\n{{"train/global_step": 2}}\n')
        with pytest.raises(ValueError, match=r"metrics\.jsonl:1: no train/global_step >= 0"):
            JsonlWriter(path, after_step=2)
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match="not a row"):
        read_rows(path)


def test_rows_are_read_one_at_a_time(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\nnot json\n')
    rows = iter(RowReader(path))
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]  # the damaged line was not looked at yet
    with pytest.raises(ValueError, match=r"metrics\.jsonl:4: not JSON"):
        next(rows)


@pytest.mark.parametrize(("end", "unfinished"), [("", False), ("\n", False), ('{"a"', True)])
def test_the_reader_tells_of_an_unfinished_row(tmp_path, end, unfinished):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n' + end)
    reader = RowReader(path)
    assert list(reader) == [{"a": 1}]
    assert reader.unfinished is unfinished

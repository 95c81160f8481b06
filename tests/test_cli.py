"""The commands, without training."""

from __future__ import annotations

import json
import os
import sys

import pytest
from program import CONFIG

from mtl_dist import cli, train
from mtl_dist.commands.rules import rules_table
from mtl_dist.weighting import COMBINATORS, RULES


def test_rules_lists_the_whole_registry(capsys):
    assert cli.main(["rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *sorted(RULES), *sorted(COMBINATORS)]
    mgda = next(line for line in lines if line.startswith("mgda"))
    assert mgda.split()[1] == "gram"
    assert "Sener and Koltun, NeurIPS 2018" in mgda
    assert "QP" in mgda
    assert "solved exactly" in mgda


def test_rules_as_json(capsys):
    assert cli.main(["rules", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert set(records) == {*RULES, *COMBINATORS}
    for name, record in records.items():
        assert record["class"] == {**RULES, **COMBINATORS}[name].__name__
        assert all(isinstance(value, str) and value for value in record.values())
    assert records["equal"]["needs"] == "losses"


def test_rules_fit_the_terminal():
    lines = rules_table(width=80).splitlines()
    assert max(map(len, lines)) == 80
    assert len(lines) == 1 + len(RULES) + len(COMBINATORS)


@pytest.mark.parametrize("main", [train.main, lambda argv: cli.main(["train", *argv])])
def test_a_wrong_setting_is_one_line_and_status_2(main, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert main(["nowhere.yaml"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("mtl_dist.train: no configuration file 'nowhere.yaml'")
    assert err.count("\n") == 1


def test_only_rank_0_tells_it(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    waited = []
    monkeypatch.setattr(train.time, "sleep", waited.append)
    assert train.main(["nowhere.yaml"]) == 2
    assert capsys.readouterr() == ("", "")
    assert waited == [2]  # or the launcher would kill rank 0 before it has told


def test_check_stops_before_any_launch(monkeypatch, capsys):
    monkeypatch.setattr(train, "train", lambda settings: pytest.fail("it trained"))
    assert cli.main(["train", "--check", str(CONFIG), "weighting=mgda"]) == 0
    assert cli.main(["train", "--check", str(CONFIG), "weighting=mdga"]) == 2
    assert "did you mean 'mgda'" in capsys.readouterr().err


def test_help_shows_the_override_syntax(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    assert "key=value" in capsys.readouterr().out


def test_a_reader_that_has_enough_is_no_error(monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["rules"]) == 0


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["rules"]) == 1
    assert capsys.readouterr().err == "mtl-dist rules: cannot write the output: No space left on device\n"


def test_a_closed_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.main(["rules"]) == 0
    sys.stdout.close()


@pytest.mark.parametrize(
    ("command", "output", "message"),
    [("report", ".", "is one file, and '.' is a folder"), ("report", "", "is one file, and '' is a folder")],
)
def test_a_folder_is_no_file_to_write(command, output, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "run", "-o", output]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("line", ["[" * 100_000, "1" * 5000, '{"train/global_step": "x"} 1'])
def test_a_damaged_row_is_told_with_its_line(line, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    assert cli.main(["groups", str(tmp_path)]) == 2
    assert "metrics.jsonl:1: not " in capsys.readouterr().err

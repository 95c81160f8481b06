"""The commands, without training."""

from __future__ import annotations

import json

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

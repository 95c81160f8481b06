"""The commands, without training."""

from __future__ import annotations

import pytest

from mtl_dist import cli, train
from mtl_dist.weighting import COMBINATORS, RULES


def test_rules_lists_the_whole_registry(capsys):
    assert cli.main(["rules"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["name", *sorted(RULES), *sorted(COMBINATORS)]
    mgda = next(line for line in lines if line.startswith("mgda"))
    assert mgda.split()[1] == "gram"
    assert "solved exactly" in mgda


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
    assert train.main(["nowhere.yaml"]) == 2
    assert capsys.readouterr() == ("", "")


def test_help_shows_the_override_syntax(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "--help"])
    assert caught.value.code == 0
    assert "key=value" in capsys.readouterr().out

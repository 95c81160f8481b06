"""The tasks of benchmarks/grouping_census.py: two groups on one table, whose second one a teacher makes."""

from __future__ import annotations

import pytest
import torch
from standins import provide

from benchmarks import grouping_census
from benchmarks.groups_study import table, train, variants
from mtl_dist.weighting import InverseGradNorm

SIZES = {"train": 400, "validation": 150, "test": 200}


@pytest.fixture
def study(tmp_path, monkeypatch):
    provide(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(grouping_census, "SIZES", SIZES)
    yield grouping_census.RealAndSynthetic()
    grouping_census.people.cache_clear()
    grouping_census.evaluated.cache_clear()


def test_the_real_targets_and_those_of_a_teacher_of_the_seed(study):
    data, again, other = study.draw(0), study.draw(0), study.draw(1)
    assert [len(part[-1]) for part in (data.train, data.validation, data.test)] == [400, 150, 200]
    for part in (data.train, data.test):
        labels = part[-1]
        assert labels.shape[1] == len(study.tasks) == 7
        assert set(labels.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(labels[:, 3:].mean(0), torch.full((4,), 0.3), rtol=0, atol=0.05)
    assert torch.equal(data.test[-1], again.test[-1])
    assert torch.equal(data.test[-1][:, :3], other.test[-1][:, :3])
    assert not torch.equal(data.test[-1][:, 3:], other.test[-1][:, 3:])


def test_a_constant_leaves_the_whole_error_and_a_trained_network_less(study):
    data = study.draw(0)
    target = data.train[-1][:, 1]
    constant = target.mean().logit().expand_as(target)
    assert study.error(constant, target) == pytest.approx(1, abs=1e-5)
    assert study.second(constant, target) == 0.5
    net, affinities = train(study, study.tasks, InverseGradNorm(), data, 1e-2, 0, 60)
    assert affinities.steps == 60
    left = study.measured(net, data.train, study.error)
    assert list(left) == list(study.tasks)
    assert sum(left.values()) / len(left) < 0.9, left


def test_every_variant_trains_every_task_once_and_the_table_has_all_of_them(study):
    found = {"found0": study.tasks[:2], "found1": study.tasks[2:]}
    every = variants(study, found)
    for name, networks in every.items():
        assert sorted(task for tasks, _ in networks for task in tasks) == sorted(study.tasks), name
    run = {kind: dict.fromkeys(study.tasks, 0.5) for kind in ("validation", "test", "extra")}
    seen = {"groups": [list(group) for group in study.true.values()], "inside": 0.1, "between": 0.0}
    facts = {"date": "", "processor": "", "torch": ""}
    errors = {name: {"0.01": [run, run]} for name in every}
    text = table(
        study, {"facts": facts, "seconds": 1, "steps": 1, "errors": errors, "where": {"here": [seen]}}
    )
    assert "| here | 1 of 1 | +0.100 | +0.000 |" in text
    assert all(
        f"| {name} | 0.01 | 0.5000 ± 0.0000 | 0.5000 | 0.5000 | +0.0 ± 0.0 |" in text for name in every
    )

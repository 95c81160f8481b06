"""Affinities against explicit steps of gradient descent, and the command and the report over made runs."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import numpy as np
import pytest
import torch
from torch import nn

from mtl_dist import Balancer, cli
from mtl_dist.grouping import Affinities, find_groups
from mtl_dist.tracking import JsonlWriter, step_row
from mtl_dist.tracking.report import groups, write_report
from mtl_dist.tracking.report.read import RunData
from mtl_dist.weighting import InverseGradNorm, InverseLoss
from tests.tracking.made_runs import write_run

TASKS = ("left", "right", "near", "far")
TARGETS = torch.tensor([[1.0, 0, 0], [1, 0.5, 0], [-1, 0, 0.2], [-1, -0.2, 0.2]], dtype=torch.float64)


def test_affinity_is_the_fall_of_a_loss_after_a_small_step_of_another():
    """Fifty et al.: `Z_ij = 1 - L_j(θ - η ∇L_i) / L_j(θ)`."""
    theta = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def losses(theta):
        return ((theta - TARGETS) ** 2).sum(1) * torch.tensor([1.0, 3.0, 1.0, 0.5])

    jacobian = torch.func.jacrev(losses)(theta)
    norms = jacobian.norm(dim=1)
    cosines = jacobian @ jacobian.T / torch.outer(norms, norms)
    parts = (part[None].numpy() for part in (cosines, norms, losses(theta)))
    found = Affinities.measure(TASKS, *parts)
    rate = 1e-7
    for i, row in enumerate(jacobian):
        z = 1 - losses(theta - rate * row) / losses(theta)
        np.testing.assert_allclose(found.affinity[i], z / rate, rtol=1e-5)
    np.testing.assert_allclose(found.cosines, cosines, rtol=1e-12)
    groups, _ = find_groups(found.links())
    assert groups == ((0, 1), (2, 3))
    assert find_groups(found.links("affinity"))[0] == groups
    inside, between = (found.agreement(groups, inside=inside) for inside in (True, False))
    assert (inside.pairs, inside.conflict) == (2, 0.0)
    assert (between.pairs, between.conflict) == (4, 1.0)
    assert between.cosine == pytest.approx(float(cosines[:2, 2:].mean()))


def test_means_are_over_the_steps_that_have_a_pair():
    nan = np.nan
    cosines = np.array([[[1, 0.4], [0.4, 1]], [[1, nan], [nan, 1]], [[1, -0.2], [-0.2, 1]]])
    found = Affinities.measure("ab", cosines, [[2.0, 1.0]] * 3, [[4.0, 1.0], [4.0, nan], [4.0, -1.0]])
    assert found.steps == 2
    assert found.cosines[0, 1] == pytest.approx(0.1)
    assert found.conflicts[0, 1] == 0.5
    assert found.affinity[0, 1] == pytest.approx(0.4 * 2)  # one loss of b is not positive
    assert found.affinity[1, 0] == pytest.approx((0.4 - 0.2) / 2 * 2 / 4)
    with pytest.raises(ValueError, match="links must be 'cosine' or 'affinity', got 'both'"):
        found.links("both")


def test_parts_of_a_run_are_the_run():
    generator = np.random.default_rng(0)
    cosines = generator.uniform(-1, 1, (7, 3, 3))
    cosines[2], cosines[5, 0, 1] = np.nan, np.nan
    norms, losses = generator.random((2, 7, 3))
    whole = Affinities.measure("abc", cosines, norms, losses)
    parts = Affinities.over("abc", [(cosines[s], norms[s], losses[s]) for s in (slice(0, 3), slice(3, 7))])
    assert parts.steps == whole.steps == 6
    for name in ("cosines", "conflicts", "affinity"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)


def test_a_long_run_of_many_tasks_is_read_in_parts(monkeypatch):
    """All cosines of 10^5 steps and 50 tasks would take 2 GB, and several copies of that."""
    tasks, steps = [f"task{i}" for i in range(12)], np.arange(4000.0)
    pairs = itertools.combinations(tasks, 2)
    columns = {f"mtl/cosine/{a}__{b}": np.full(4000, 0.5, np.float32) for a, b in pairs}
    columns |= {f"mtl/loss/{task}": np.ones(4000, np.float32) for task in tasks}
    run = RunData("run", steps, columns, {}, 1, "", ())
    monkeypatch.setattr(groups, "MOST_AT_ONCE", 1 << 14)
    tracemalloc.start()
    found = groups.affinities_of([run])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.steps == 4000
    assert found.cosines[0, 1] == pytest.approx(0.5)
    assert peak < 12**2 * 4000 * 8 / 2  # one copy of all cosines is twice that


def train(folder, rule, steps=20):
    """A run with two groups of tasks that pull one vector to opposite sides."""
    folder.mkdir()
    torch.manual_seed(0)
    trunk, balancer = nn.Linear(3, 3).double(), Balancer(TASKS, rule)
    optimizer = torch.optim.SGD(trunk.parameters(), lr=1e-3)
    with JsonlWriter(folder / "metrics.jsonl") as writer:
        for step in range(steps):
            heads = {
                task: lambda z, target=target: (z - target).square().mean()
                for task, target in zip(TASKS, TARGETS, strict=True)
            }
            optimizer.zero_grad()
            balancer(trunk(torch.randn(8, 3, dtype=torch.float64)), heads).backward()
            optimizer.step()
            writer.write(step_row(balancer.report, step + 1))
    return folder


def test_command_finds_the_groups_of_runs(tmp_path, capsys):
    runs = [str(train(tmp_path / name, InverseGradNorm())) for name in ("a", "b")]
    assert cli.main(["groups", *runs]) == 0
    text = capsys.readouterr().out
    assert "4 tasks, 40 steps" in text
    assert "group 1: left, right\ngroup 2: near, far\n" in text
    assert cli.main(["groups", runs[0], "--links", "affinity", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["groups"] == [["left", "right"], ["near", "far"]]
    assert record["inside"]["cosine"] > 0 > record["between"]["cosine"]
    assert record["codelength"] < min(record["codelength_of_one_group"], record["codelength_of_single_tasks"])
    assert np.shape(record["affinity"]) == (4, 4)


def test_command_says_what_is_missing(tmp_path, capsys):
    run = train(tmp_path / "losses", InverseLoss(), steps=2)
    assert cli.main(["groups", str(run)]) == 2
    assert cli.main(["groups", str(tmp_path / "none")]) == 2
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    assert cli.main(["groups", str(tmp_path / "empty")]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.startswith("mtl-dist groups: no cosine of two tasks was recorded: train with a rule that")
    assert second.startswith("mtl-dist groups: no run folder")
    assert third.startswith("mtl-dist groups: no run has values of tasks")


def test_command_leaves_out_what_cannot_be(tmp_path, capsys):
    run = train(tmp_path / "a", InverseGradNorm())
    assert cli.main(["groups", str(run)]) == 0
    file, right = run / "metrics.jsonl", capsys.readouterr().out
    for value, said in ((5.0, "mtl/cosine/left__near has values outside [-1, 1]"), ("x", "not numbers")):
        row = {"train/global_step": 21, "mtl/cosine/left__near": value}
        file.write_text(file.read_text() + json.dumps(row) + "\n")
        assert cli.main(["groups", str(run)]) == 0
        told = capsys.readouterr()
        assert told.out == right
        assert said in told.err
        assert "line 21" in told.err


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cosines": 5.0}, r"cosines must be finite and in \[-1, 1\], or NaN, got 5\.0"),
        ({"cosines": -np.inf}, "cosines must be finite"),
        ({"norms": -1.0}, "norms must be finite and in .0, inf., or NaN, got -1"),
        ({"losses": np.inf}, "losses must be finite"),
    ],
)
def test_what_cannot_be_is_refused(damage, message):
    given = {"cosines": np.zeros((3, 2, 2)), "norms": np.ones((3, 2)), "losses": np.ones((3, 2))}
    for name, value in damage.items():
        given[name][1, ..., 0] = value
    with pytest.raises(ValueError, match=message):
        Affinities.measure("ab", **given)
    with pytest.raises(ValueError, match=r"norms must be of shape \[3, 2\], got \[2, 2\]"):
        Affinities.measure("ab", np.zeros((3, 2, 2)), np.ones((2, 2)), np.ones((3, 2)))


def test_report_draws_the_groups(tmp_path):
    page = write_report([train(tmp_path / "a", InverseGradNorm())]).read_text("utf-8")
    assert '<ol class="members"><li>left, right</li><li>near, far</li></ol>' in page
    assert page.count("<title>left, right: ") == 1
    assert page.count('stroke="currentColor"') == 2
    # nothing to draw, or too much
    two = write_report([write_run(tmp_path / "two", ("a", "b"), 3)]).read_text("utf-8")
    assert "Groups of tasks" not in two
    many = write_report([write_run(tmp_path / "many", [f"t{i}" for i in range(41)], 3)]).read_text("utf-8")
    assert "No picture: there are more than 40 tasks." in many
    evil = write_report([write_run(tmp_path / "evil", ("<i>", "b", "c"), 3)]).read_text("utf-8")
    assert "<i>:" not in evil

"""`benchmarks/which_rule.py`: rates are tuned on other seeds and samples than those that are reported."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import claims, which_rule
from benchmarks.data_sets import DATA_SETS, RANDOM, DataSet
from benchmarks.trials import Store
from benchmarks.which_rule import (
    HALF,
    LARGER,
    RATES,
    REPORTED,
    TUNING,
    Trainings,
    best_rate,
    lagged,
    page,
    rows,
)
from mtl_dist.weighting import RULES

DIGITS = DATA_SETS["multi_digits"]
QUALITY = {"equal": 0.5, "mgda": 0.9, f"{RANDOM}0": 0.7}  # of a made-up training at the best rate
BEST = 3e-3


class MadeUp(DataSet):
    """Answers at once. What it was asked is in `asked`."""

    asked: list[tuple[str, float, int, slice, int]] = []

    def train(self, entry, learning_rate, seed, part, lag=0):
        self.asked.append((entry, learning_rate, seed, part, lag))
        if entry == "krum":
            return "krum: a loss is NaN"
        quality = QUALITY.get(entry, 1.0) - 0.1 * (learning_rate != BEST) - 0.01 * seed * (seed < 10)
        return {task: quality if self.sign(task) > 0 else 1 / quality for task in self.tasks}


@pytest.fixture
def trainings(tmp_path: Path) -> Trainings:
    MadeUp.asked.clear()
    made_up = MadeUp(**{field: getattr(DIGITS, field) for field in DIGITS.__dataclass_fields__})
    return Trainings(made_up, Store(tmp_path / "here.json", made_up.schedule, {}))


def test_tuning_never_sees_what_is_reported(trainings):
    rows(trainings, ["equal", "mgda"])
    assert set(TUNING).isdisjoint(REPORTED)
    for _, rate, seed, part, _ in MadeUp.asked:
        assert part == HALF[seed]
        assert seed in TUNING or rate == BEST, "the best rate alone is reported"
    samples = range(11)
    assert set(samples[HALF[TUNING[0]]]).isdisjoint(samples[HALF[REPORTED[0]]])


def test_each_entry_gets_the_same_number_of_trials(trainings):
    rows(trainings, ["equal", "mgda", f"{RANDOM}0"])
    per_entry = {entry: 0 for entry, *_ in MadeUp.asked}
    for entry, *_ in MadeUp.asked:
        per_entry[entry] += 1
    assert set(per_entry.values()) == {len(RATES) * len(TUNING) + len(REPORTED)}
    assert len(per_entry) == len(DIGITS.tasks) + 3


def test_the_grid_grows_where_its_largest_rate_is_the_best():
    tried: list[float] = []

    def score(rate: float) -> float:
        tried.append(rate)
        return rate

    assert best_rate(score) == (LARGER, LARGER)
    assert tried == [*RATES, LARGER]
    assert best_rate(lambda rate: -rate) == (RATES[0], -RATES[0])


def test_rows_are_ordered_and_failures_are_named(trainings):
    found, failed = rows(trainings, ["equal", "krum", "mgda", f"{RANDOM}0"])
    assert [row.entry for row in found] == ["mgda", f"{RANDOM}0", "equal"]
    assert failed == ["krum"]
    text = page("multi_digits", trainings, found, failed)
    assert "Trainings that ended with an error: krum." in text
    assert "best of 1 random weights" in text


def test_delta_has_the_sign_of_the_metric(trainings):
    alone = dict(zip(DIGITS.tasks, (0.5, 0.5, 2.0, 10.0), strict=True))
    better = {"left": 0.55, "right": 0.5, "sum": 1.8, "image": 11.0}  # +10 %, 0, +10 %, +10 %
    assert DIGITS.delta(better, alone) == pytest.approx(7.5)


def test_a_lag_is_tried_for_the_best_of_each_kind(trainings):
    found, _ = rows(trainings, ["equal", "mgda", "inverse_grad_norm", "upgrad"])
    assert set(lagged(trainings, found)) == {"equal", "inverse_grad_norm", "upgrad"}
    assert {entry for entry, *_, lag in MadeUp.asked if lag} == {"equal", "inverse_grad_norm", "upgrad"}


def test_an_interrupted_run_goes_on(trainings, tmp_path):
    first, _ = rows(trainings, ["equal"])
    MadeUp.asked.clear()
    again = replace(trainings, store=Store(tmp_path / "here.json", DIGITS.schedule, {}))
    assert rows(again, ["equal"])[0] == first
    assert MadeUp.asked == []


def test_claims_train_nothing(trainings, tmp_path):
    made_up = replace(trainings, store=Store(tmp_path / "none.json", DIGITS.schedule, {}, only_read=True))
    with pytest.raises(KeyError, match="run the benchmark that writes it"):
        rows(made_up, ["equal"])
    assert MadeUp.asked == []


def test_a_claim_is_a_paired_difference(trainings):
    found, _ = rows(trainings, ["equal", "inverse_loss", f"{RANDOM}0", f"{RANDOM}1"])
    values = claims.entries(found)
    assert set(values) == {"equal", "inverse_loss", claims.BEST_RANDOM}
    text = claims.table({"here": values})
    (row,) = (line for line in text.splitlines() if "inverse_loss - equal" in line)
    differences = [a - b for a, b in zip(values["inverse_loss"], values["equal"], strict=True)]
    shown = float(row.split("|")[3].split("±")[0])
    assert shown == pytest.approx(sum(differences) / len(differences), rel=0.05)
    (missing,) = (line for line in text.splitlines() if "- grad_norm" in line)
    assert missing.endswith("|  |"), "no result, no number"


def test_the_picture_names_every_row(trainings, tmp_path):
    found, _ = rows(trainings, ["equal", "mgda", f"{RANDOM}0"])
    which_rule.draw(found, lagged(trainings, found), tmp_path / "here.png")
    assert (tmp_path / "here.png").stat().st_size > 5_000


@pytest.mark.parametrize("name", DATA_SETS)
def test_all_rules_can_be_made_for_the_data_set(name):
    data_set = DATA_SETS[name]
    assert len(set(data_set.rules)) == len(data_set.rules)
    for rule in data_set.rules:
        if rule not in data_set.choices:  # those may need the data
            assert data_set.balancer(rule, 0).tasks == data_set.tasks


def test_the_smallest_data_set_has_every_rule():
    """But two: a rule for KL terms, and one for tasks with different counts."""
    assert set(RULES) - set(DIGITS.rules) == {"kl_balance", "token_share"}


def test_one_real_training():
    short = replace(DIGITS, schedule=replace(DIGITS.schedule, steps=6))
    metrics = short.train("coba", 3e-3, 0, HALF[0])
    assert set(metrics) == set(DIGITS.tasks), metrics
    assert short.train("coba", 3e-3, 0, HALF[0]) == metrics
    assert short.train("coba", 3e-3, 0, HALF[TUNING[0]]) != metrics, "other samples"

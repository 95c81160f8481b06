"""Which steps have rows, when they are handed on, and what a tracker that fails costs."""

from __future__ import annotations

import logging

import pytest
import torch

from mtl_dist.stats import StepReport, TaskStats
from mtl_dist.tracking import TRACKERS, RunInfo, RunLog, Tracker, run_log
from mtl_dist.tracking.tracker import require


def report(value=1.0, sync=None):
    one = torch.tensor([value], dtype=torch.float64)
    return StepReport(("a",), TaskStats(one, one > 0, None, torch.ones_like(one)), one, torch.tensor(False))


class Memory(Tracker):
    """Keeps what it is given; fails where it is told to."""

    name = "memory"
    run_id = "run-7"

    def __init__(self, fails=""):
        self.fails, self.rows, self.ended = fails, [], []

    def _do(self, what):
        if self.fails == what:
            raise RuntimeError(f"no {what}\n  today")

    def start(self, run):
        self._do("start")
        self.info = run

    def log(self, row):
        self._do("log")
        self.rows.append(row)

    def close(self, summary):
        self._do("close")
        self.ended.append(summary)
        self.where = "look here"

    @property
    def steps(self):
        return [row["train/global_step"] for row in self.rows]


@pytest.fixture
def info(tmp_path):
    return RunInfo(tmp_path, ("a",), {"steps": 7})


def drive(trackers, info, steps=7, log_every=1, due=()):
    with RunLog(trackers, info, log_every) as log:
        for step in range(1, steps + 1):
            log.add(report(step))
            log.step(step, {"perf/step_ms": 2.0}, due=step in due)
        return log, log.close({"steps": steps})


def test_one_row_a_step(info):
    tracker = Memory()
    log, views = drive([tracker], info)
    assert tracker.info is info
    assert tracker.steps == [1, 2, 3, 4, 5, 6, 7]
    assert [row["mtl/loss/a"] for row in tracker.rows] == [1, 2, 3, 4, 5, 6, 7]
    assert all(row["perf/step_ms"] == 2 for row in tracker.rows)
    assert tracker.ended == [{"steps": 7}]
    assert views == ["look here"]
    assert log.last_row == tracker.rows[-1]


def test_every_third_row_and_those_that_are_due(info):
    tracker = Memory()
    drive([tracker], info, log_every=3, due=(7,))
    assert tracker.steps == [3, 6, 7]


def test_micro_batches_of_a_step_share_its_row(info):
    tracker = Memory()
    with RunLog([tracker], info, log_every=2) as log:
        for step in (1, 2):
            for micro in (1.0, 3.0):
                log.add(report(10 * step + micro))
            log.step(step)
        log.close({})
    assert [row["mtl/loss/a"] for row in tracker.rows] == [22]


def test_a_window_is_reported_once_and_its_report_holds(info):
    """Between two windows a balancer shows the report of the one before."""
    tracker = Memory()
    windows = [report(1.0), report(2.0)]
    with RunLog([tracker], info) as log:
        for step, shown in enumerate(([None, windows[0]], [windows[0], windows[1]], [windows[1]] * 2), 1):
            for seen in shown:
                log.add(seen)
            log.step(step)
        log.close({})
    assert [row["mtl/loss/a"] for row in tracker.rows] == [1, 2, 2]


class Late(run_log.Snapshot):
    """As on an accelerator: its numbers come later."""

    ready = False


def test_on_an_accelerator_a_row_comes_a_step_later(info, monkeypatch):
    monkeypatch.setattr(run_log, "Snapshot", Late)
    tracker = Memory()
    with RunLog([tracker], info, log_every=2) as log:
        for step, arrived in enumerate(([], [], [2], [2], [2, 4]), start=1):
            log.add(report(step))
            log.step(step)
            assert tracker.steps == arrived, step
        log.add(report(6))
        log.step(6)
        assert tracker.steps == [2, 4]
        log.close({})
    assert tracker.steps == [2, 4, 6]
    assert tracker.rows[0]["mtl/loss/a"] == 2  # the step's own numbers, not those of the step after


@pytest.mark.parametrize("what", ["start", "log", "close"])
def test_a_tracker_that_fails_is_told_once_and_dropped(info, caplog, what):
    sound, broken = Memory(), Memory(fails=what)
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        drive([broken, sound], info)
    assert sound.steps == [1, 2, 3, 4, 5, 6, 7]
    assert sound.ended == [{"steps": 7}]
    (message,) = [record.message for record in caplog.records]
    assert message == (
        f"mtl_dist: memory failed in {what} and is dropped: no {what} today. "
        "Training continues; every row is in metrics.jsonl"
    )


def test_the_record_that_a_run_relies_on_may_not_fail(info):
    broken = Memory(fails="log")
    broken.name = "jsonl"
    with pytest.raises(RuntimeError, match="no log"):
        drive([broken], info)


def test_a_failed_run_is_closed_as_one(info):
    tracker = Memory()
    log = RunLog([tracker], info)

    def fail():
        with log:
            log.add(report())
            log.step(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert tracker.ended == [None]
    assert log.close({}) == []  # once


def test_how_trackers_call_the_run(info):
    with RunLog([Memory()], info) as log:
        assert log.run_ids == {"memory": "run-7"}


def test_a_step_without_a_report_says_what_is_wrong(info):
    with (
        RunLog([], info) as log,
        pytest.raises(ValueError, match="the model's forward did not call the balancer"),
    ):
        log.step(1)


def test_a_package_that_is_missing_is_a_setting_that_is_wrong():
    with pytest.raises(ValueError, match=r"'x' needs the package no_such_thing.*pip install 'mtl-dist\[e\]'"):
        require("no_such_thing", "x", "e")


def test_trackers_are_listed_by_their_names():
    assert all(cls.name == name for name, cls in TRACKERS.items())


@pytest.mark.parametrize("every", [0, -1, True, 2.5, "2", None])
def test_a_wrong_number_of_steps_is_refused(tmp_path, every):
    with pytest.raises(ValueError, match="log_every must be a number of steps >= 1"):
        RunLog([], RunInfo(tmp_path, ("a",), {}), every)

"""Features and heads on the last stage of a pipeline: the balancer runs on the ranks of this stage alone."""

from __future__ import annotations

from pathlib import Path

import compare_runs
import pipeline
import pytest
import torch
from launcher import succeed

QUICK = (
    "GPipe: losses, lag",
    "GPipe: FeatureProbe",
    "GPipe: FeatureTap",
    "1F1B: losses",
    "1F1B: FeatureProbe in loss_fn",
    "1F1B: FeatureProbe, lag",
    "zero bubble: FeatureTap, lag",
    "zero bubble: FeatureProbe, window",
)


def trained(folder: Path, names: tuple[str, ...]) -> dict:
    succeed(pipeline.__file__, 4, str(folder / "out.pt"), *names)
    return torch.load(folder / "out.pt")


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return trained(tmp_path_factory.mktemp("pipeline"), QUICK)


def check(got: dict, name: str) -> None:
    expected = pipeline.alone(name)
    windows = pipeline.STEPS if "window" in name else pipeline.STEPS * pipeline.MICRO
    assert expected["calls"] == got["calls"] == windows
    compare_runs.check(expected, got)


@pytest.mark.parametrize("name", QUICK)
def test_the_last_stage_equals_one_process(quick: dict, name: str) -> None:
    check(quick[name], name)


@pytest.mark.long
def test_every_schedule_with_every_case(tmp_path: Path) -> None:
    results = trained(tmp_path, tuple(pipeline.ALL))
    assert len(results) == 24
    for name, got in results.items():
        check(got, name)

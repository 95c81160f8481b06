"""Paths of the helpers that tests and launched scripts share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

for folder in (".", "cluster", "device", "distributed", "faults", "layouts", "weighting"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# the files that take longest, first: a worker that begins one at the end leaves the others without work
LONGEST = (
    "distributed/test_equivalence.py",
    "engines/test_matrix.py",
    "test_engine_configs.py",
    "test_launch.py",
    "weighting/test_laws.py",
    "distributed/test_agreement.py",
    "test_benchmarks.py",
    "distributed/test_resume.py",
    "distributed/test_virtual.py",
    "recipes/test_text_mixture.py",
    "test_warm.py",
    "distributed/test_shared_layer_ranks.py",
    "test_train.py",
    "distributed/test_parameter_engines.py",
    "test_doctor.py",
    "device/test_stand_in.py",
    "integrations/test_accelerate.py",
    "integrations/test_transformers.py",
    "tracking/test_trackers.py",
    "test_toy.py",
    "test_writing.py",
    "test_debug_run.py",
    "recipes/test_side_tuning.py",
    "tracking/test_report_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of `LONGEST` come first; all else stays where it is."""
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """A test draws the same numbers whatever ran before it in its process."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_unconfigure() -> None:
    """Ends the processes that tests forked their ranks from."""
    if "warm" in sys.modules:
        sys.modules["warm"].close()

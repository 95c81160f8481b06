"""Paths of the helpers that tests and launched scripts share."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (".", "distributed", "weighting"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_unconfigure() -> None:
    """Ends the processes that tests forked their ranks from."""
    if "warm" in sys.modules:
        sys.modules["warm"].close()

"""Paths of the helpers that tests and launched scripts share."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in (".", "distributed", "faults", "weighting"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

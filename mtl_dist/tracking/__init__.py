"""From step reports to rows, files and charts."""

from __future__ import annotations

from mtl_dist.tracking.jsonl import JsonlWriter, read_rows
from mtl_dist.tracking.rows import Row, step_row

__all__ = ["JsonlWriter", "Row", "read_rows", "step_row"]

"""One self-contained HTML file of one or several runs: `mtl-dist report RUN_DIR [RUN_DIR ...] [-o FILE]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl_dist.tracking.files import REPORT


def write_report(folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Reads runs and writes their report, whole or not at all.

    Args:
        folders: of the runs, each with a `metrics.jsonl`.
        path: of the HTML file; by default `report.html` in the folder of a single run, or here for several.

    Returns:
        where the report is.

    Raises:
        ValueError: no folder, a folder that is not a run, or damaged metrics.
        OSError: the file cannot be written.
    """
    # pages are made at the end of a run or by hand: training need not load this before
    from mtl_dist.tracking.report.page import render
    from mtl_dist.tracking.report.read import read_runs

    if not folders:
        raise ValueError("a report needs at least one run folder")
    runs = [Path(folder) for folder in folders]
    target = Path(path) if path is not None else (runs[0] if len(runs) == 1 else Path()) / REPORT
    text = render(read_runs(runs))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))  # a lone surrogate has no UTF-8
    return unfinished.replace(target)

"""One self-contained HTML file for one or several runs: `mtl-dist report RUN_DIR [RUN_DIR ...] [-o FILE]`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mtl_dist.tracking.files import REPORT


def write_report(folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Reads runs and writes their report. The file is replaced only when the report is complete.

    Args:
        folders: folders of the runs, each with a `metrics.jsonl`.
        path: path of the HTML file. Default: `report.html`, in the folder of a single run, or in the current
            folder for several runs.

    Returns:
        the path of the report.

    Raises:
        ValueError: there is no folder, a folder is not a run, or the metrics are damaged.
        OSError: the file cannot be written.
    """
    # imported late: a training needs this only at its end
    from mtl_dist.tracking.report.page import render
    from mtl_dist.tracking.report.read import read_runs

    if not folders:
        raise ValueError("a report needs at least one run folder")
    runs = [Path(folder) for folder in folders]
    target = Path(path) if path is not None else (runs[0] if len(runs) == 1 else Path()) / REPORT
    if not target.name or target.is_dir():
        raise ValueError(f"the report is one file, and {str(path)!r} is a folder: name a file in it")
    text = render(read_runs(runs))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(target.name + ".tmp")
    unfinished.write_bytes(text.encode("utf-8", "xmlcharrefreplace"))  # lone surrogates have no UTF-8
    return unfinished.replace(target)

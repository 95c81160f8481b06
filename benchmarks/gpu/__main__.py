"""Proof on GPUs by one command; `bash launch/gpu.sh` finds a Python for it.

    python -m benchmarks.gpu [--part NAME ...] [--out FOLDER] [--brief] [--again]

Each part runs in processes of its own, with a limit on its time, and writes `FOLDER/<part>.json` after every
check. What has a result is not run again. Ends in `FOLDER/report.md` and one line that is the verdict; the
exit status is 1 unless all passed. Needs torch and numpy; no network, no installation. Without a GPU it runs
its small form on the CPU, which tests the program and says nothing about GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import machine
from benchmarks.gpu.engines import ROOT, ended
from benchmarks.gpu.parts import PARTS, work
from benchmarks.gpu.record import FAILED
from benchmarks.gpu.report import counted, page, verdict

WHOLE = 570.0  # seconds for all parts; the last one to hang gets GRACE more
GRACE = 25.0


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="bash launch/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
    parser.add_argument(
        "--part", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="NAME", help=parts
    )
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="default: runs/gpu")
    parser.add_argument("--brief", action="store_true", help="the small form; always so without a GPU")
    parser.add_argument("--again", action="store_true", help="forget what these parts have found")
    parser.add_argument("--worker", metavar="NAME", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=0.0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def refuse_other_machine(out: Path, mine: dict[str, Any]) -> None:
    """Raises `SystemExit` where the folder has results of another machine, torch or commit."""
    for name in PARTS:
        path = out / f"{name}.json"
        found = json.loads(path.read_text(encoding="utf-8"))["facts"] if path.exists() else {}
        theirs = found or mine  # a part that died at its start knew nothing
        for key in ("device", "gpus", "processor", "torch", "driver"):
            if theirs.get(key) != mine.get(key):
                raise SystemExit(
                    f"error: {path} is of another machine ({key} {theirs.get(key)!r}, here "
                    f"{mine.get(key)!r}): give --again, or another folder in --out"
                )


def run_part(name: str, options: argparse.Namespace, left: float, *, brief: bool) -> None:
    """One part in processes of its own. What it did not finish becomes a failure."""
    part, gpus = PARTS[name], torch.cuda.device_count()
    seconds = min(part.seconds, left)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
    command = [sys.executable, *(torchrun if part.ranks and gpus > 1 else [])]
    command += [
        "-m",
        "benchmarks.gpu",
        "--worker",
        name,
        "--seconds",
        str(seconds),
        "--out",
        str(options.out),
    ]
    path = options.out / f"{name}.json"
    if seconds < 5:
        said = "not reached within the time of the run"
    else:
        said = ended([*command, *(["--brief"] if brief else [])], seconds + GRACE, {"PYTHONPATH": str(ROOT)})
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"facts": {}, "results": {}}
    found["results"].pop("the part itself", None)
    if "ended with 0:" not in said:
        found["results"]["the part itself"] = {"outcome": FAILED, "reason": said}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """The whole run; 0 where everything passed or was skipped with its reason."""
    options = arguments_of(argv)
    brief = options.brief or not torch.cuda.is_available()
    options.out = options.out.resolve()
    if options.worker:
        work(options.worker, options.out, options.seconds, brief=brief)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    if options.again:
        for name in options.part:
            (options.out / f"{name}.json").unlink(missing_ok=True)
    facts = machine.facts()
    refuse_other_machine(options.out, facts)
    began = time.monotonic()
    for name in options.part:
        left = WHOLE - (time.monotonic() - began)
        print(f"{name}: {PARTS[name].about}", file=sys.stderr, flush=True)
        run_part(name, options, left, brief=brief)
        print(f"  {counted(options.out / f'{name}.json')}", file=sys.stderr, flush=True)
    text = page(options.out, facts, list(PARTS), brief=brief)
    (options.out / "report.md").write_text(text, encoding="utf-8")
    line, status = verdict(options.out, facts, list(PARTS), time.monotonic() - began, brief=brief)
    print(f"wrote {options.out / 'report.md'}\n{line}")
    return status


if __name__ == "__main__":
    raise SystemExit(main())

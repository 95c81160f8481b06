"""Part `training`: the training program under every file of configs/engine, by `accelerate launch`.

At every step each training has the losses and weights of one that nothing launched; the batch is cut over all
GPUs. bf16 is compared with float32 as far as its digits go. In float16 the first steps overflow until the
loss scale has come down, so only what comes before an update is compared. One training is interrupted, and
goes on.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.engines import ROOT, at_once, ended
from benchmarks.gpu.record import CannotRun, Found, Record, outcome

RECIPE = ROOT / "configs" / "recipe" / "multi_digits.yaml"
ENGINES = ("ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3")
HALF = ("ddp", "fsdp2", "zero2", "zero3")
NEEDED = ("accelerate", "pydantic", "yaml", "sklearn", "safetensors")
# relative to the largest value: convolutions of GPUs round to 11 bits (TF32) and add in any order
BOUNDS = {"no": 2e-3, "bf16": 5e-2}
FIRST = 1e-2  # of the losses before the first update in float16
OVERFLOWS = 6  # at most, from a loss scale of 65536
LIMIT = 100.0  # seconds a training
STEPS, SAVED = 20, 10
Rows = list[dict[str, Any]]


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """All trainings, some at a time."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:

        def cannot() -> Found:
            raise CannotRun(f"{', '.join(missing)} not installed")

        record.run("the training program", cannot)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        expected = rows_of(folder / "alone", [sys.executable, "-m", "mtl_dist.train"])
        works = {
            name: work for name, work in trainings(folder, expected, device, brief) if record.wants(name)
        }
        with ThreadPoolExecutor(at_once()) as pool:
            checks = {pool.submit(outcome, work): name for name, work in works.items()}
            for done in as_completed(checks):
                record.put(checks[done], done.result())


def trainings(
    folder: Path, expected: Rows, device: torch.device, brief: bool
) -> Iterator[tuple[str, Callable[[], Found]]]:
    """Each one by its name."""
    ddp = "ddp" if device.type == "cuda" else "ddp_cpu"
    for engine in [ddp] if brief else ENGINES:
        yield engine, partial(one, engine, "no", folder, expected)
    for precision in () if brief else ("bf16", "fp16"):
        for engine in HALF:
            if (engine, precision) != ("fsdp2", "fp16"):  # Accelerate has no loss scaling for it
                yield f"{engine}, {precision}", partial(one, engine, precision, folder, expected)
    yield f"{ddp}, interrupted and resumed", partial(resumed, ddp, folder, expected)


def launched(engine: str, precision: str) -> list[str]:
    """`accelerate launch` on all GPUs, or on two processes of a CPU."""
    processes = str(torch.cuda.device_count() or 2)
    config = str(ROOT / "configs" / "engine" / f"{engine}.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
    return [*accelerate, "--num_processes", processes, "--mixed_precision", precision, "-m", "mtl_dist.train"]


def rows_of(out: Path, command: list[str], *settings: str) -> Rows:
    """What a training has logged.

    Raises:
        AssertionError: it failed.
    """
    own = [f"output_dir={out}", f"steps={STEPS}", f"checkpoint_every={SAVED}", "eval_every=0", *settings]
    said = ended([*command, str(RECIPE), *own], LIMIT, {"PYTHONPATH": str(ROOT)})
    assert "ended with 0:" in said, said
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def one(engine: str, precision: str, folder: Path, expected: Rows) -> Found:
    """One training to its end."""
    if engine.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise CannotRun("deepspeed not installed")
    got = rows_of(folder / f"{engine}-{precision}", launched(engine, precision))
    return overflown(expected, got) if precision == "fp16" else compared(expected, got, BOUNDS[precision])


def overflown(expected: Rows, got: Rows) -> Found:
    """A training whose first steps were skipped: it starts from the same losses, measures, and learns."""
    assert len(got) == STEPS, f"{len(got)} rows"
    losses, norms = (
        [name for name in expected[0] if f"mtl/{kind}/" in name] for kind in ("loss", "grad_norm")
    )
    error = max(abs(got[0][name] / expected[0][name] - 1) for name in losses)
    assert error <= FIRST, f"the first losses differ by {error:.1e}, allowed are {FIRST:.0e}"
    held = [row["train/global_step"] for row in got if any(row.get(name) is None for name in norms)]
    assert held == list(range(1, len(held) + 1)), f"steps without a measurement: {held}"
    assert len(held) <= OVERFLOWS, f"{len(held)} steps without a measurement"
    before, after = (sum(row[name] for name in losses) for row in (got[0], got[-1]))
    assert after < 0.7 * before, f"the losses went from {before:.3g} to {after:.3g} in {STEPS} steps"
    return {"error": error, "skipped": len(held)}


def resumed(engine: str, folder: Path, expected: Rows) -> Found:
    """One that stops after half of its steps and goes on."""
    out, command = folder / "resumed", launched(engine, "no")
    assert len(rows_of(out, command, f"steps={SAVED}")) == SAVED
    return compared(expected, rows_of(out, command, "resume_from=latest"), BOUNDS["no"])


def compared(expected: Rows, got: Rows, bound: float) -> Found:
    """The largest difference of losses and weights, relative to the largest value of that column.

    Raises:
        AssertionError: it is above the bound, or rows are missing.
    """
    steps = [row["train/global_step"] for row in got]
    assert steps == [row["train/global_step"] for row in expected], f"steps {steps}"
    columns = [name for name in expected[0] if name.startswith(("train/loss", "mtl/loss/", "mtl/weight/"))]
    errors = {}
    for name in columns:
        mine, theirs = (torch.tensor([row[name] for row in rows]) for rows in (got, expected))
        errors[name] = float((mine - theirs).abs().max() / theirs.abs().max())
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] <= bound, f"{worst} differs by {errors[worst]:.1e}, allowed are {bound:.0e}"
    return {"error": errors[worst]}

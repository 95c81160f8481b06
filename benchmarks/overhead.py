"""The cost of a balanced step beside a plain step: time, memory, operators and host reads, paired in one run.

    python benchmarks/overhead.py --heads decoder lm --tasks 2 8 32
    python benchmarks/overhead.py --heads linear
    python benchmarks/overhead.py --engine ddp fsdp2 zero2 --ranks 2
    python benchmarks/overhead.py --engine ddp fsdp2 zero2 --heads decoder

These four commands make all tables that matter. Each table is one kind of heads under one engine on 1 or 2
ranks, and is appended to benchmarks/results/overhead.md.

Heads are `linear` (classifiers on an MLP, which cost next to nothing), `decoder` (two of them are as much
work as the convolutional trunk) or `lm` (one language-model head on a transformer; every text has one task).
`tiny` is an MLP so small that only the host's own time is left: what a step takes of the host where an
accelerator computes.

In each round every variant takes two steps in a row, in an order that changes from round to round. The
second one counts, so that it pays for what the first left to be waited for. "time" is the median over rounds
of time / (time of the plain step in the same round), ± half of its 95 % interval; "ms more" is that of the
difference. "CPU" is the same ratio for the CPU time of all threads of rank 0. "memory" is the peak of three
steps, network and gradients included, as torch's allocator gave it out, over that of the plain step.
Operators (those that are no views), host reads and collectives are medians over five more steps
(counting.py).

The plain step is the same model under the same engine, with a plain sum of its losses. "And the ranks meet"
is the plain step with one all-reduce of its losses after the heads; its result is not used. This is the
minimal cost of weights on which all ranks agree before the backward. Most of it is the wait for the slower
rank. No engine works correctly with TorchJD and "one backward a task". They run on the bare model, are
compared only with plain torch and DDP, and average gradients over ranks in one all-reduce afterwards.
Variants with `lag=1` promise equal counts, unless they say "counts given".
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counting import PeakMemory, counting
from engines import ENGINES, Step, start
from problems import PROBLEMS, Problem
from tables import RESULTS, facts, left_out_lines, median_and_error
from variants import ALL, BARE, LOGGING, PLAIN, VARIANTS, left_out, make_step

COLUMNS = ("time", "CPU", "ms more", "memory", "operators", "reads", "collectives")
Cell = dict[str, Any]
_ENVIRONMENT = {
    # glibc keeps what is freed, as accelerators do: else some steps pay thousands of page faults, others none
    "MALLOC_TOP_PAD_": str(1 << 26),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "KINETO_LOG_LEVEL": "5",  # of the profiler that measures memory
}


# ---- the measuring processes ---------------------------------------------------------------------


def worker(arguments: argparse.Namespace) -> None:
    """Measures one table on every rank; rank 0 prints one JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    engine, ranks = arguments.engine[0], arguments.ranks[0]
    start(engine, ranks, device)
    cells = {str(tasks): measured(tasks, arguments, device) for tasks in arguments.tasks}
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write("RESULT " + json.dumps(cells) + "\n")
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def measured(tasks: int, arguments: argparse.Namespace, device: torch.device) -> Cell:
    """All variants with this number of tasks."""
    heads, engine = arguments.heads[0], arguments.engine[0]

    def make(name: str) -> tuple[Step, Problem]:
        return make_step(name, heads, tasks, arguments.batch, device, engine)

    notes: dict[str, str] = {}
    steps: dict[str, tuple[Step, Problem]] = {}
    for name in arguments.variants:
        reason = left_out(name, engine, arguments.ranks[0])
        if reason is None:
            steps[name] = make(name)
            reason = refusal(*steps[name], device)
        if reason is not None:
            steps.pop(name, None)
            notes[name] = reason
    assert PLAIN in steps, f"the plain step does not run: {notes}"
    cell: Cell = {"notes": notes, **times(steps, arguments, device)}
    cell["counts"] = {name: counted(step, net, device) for name, (step, net) in steps.items()}
    names = list(steps)
    steps.clear()
    peak(partial(make, PLAIN), device)  # what only the first step of a process takes does not count
    cell["memory"] = {name: peak(partial(make, name), device) for name in names}
    return cell


def refusal(step: Step, net: Problem, device: torch.device) -> str | None:
    """What a balancer says if it refuses the problem; None if the step runs. All ranks refuse alike."""
    try:
        step(*net.draw(device))
    except (TypeError, ValueError) as error:
        if net.balancer is None:
            raise
        return str(error)
    return None


def times(
    steps: dict[str, tuple[Step, Problem]], arguments: argparse.Namespace, device: torch.device
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of wall and CPU time of every variant, round by round."""
    order = random.Random(0)
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    LOGGING.clear()
    for number in range(arguments.rounds + arguments.warmup):
        for name in order.sample(list(steps), len(steps)):
            step, net = steps[name]
            first, second = net.draw(device), net.draw(device)
            if dist.is_initialized():
                dist.barrier()
            if name not in BARE:  # those leave nothing to wait for, and are long
                step(*first)
            _wait(device)
            before = time.perf_counter(), time.process_time()
            step(*second)
            _wait(device)
            after = time.perf_counter(), time.process_time()
            if number >= arguments.warmup:
                wall[name].append(1e3 * (after[0] - before[0]))
                cpu[name].append(1e3 * (after[1] - before[1]))
    return {"wall": wall, "cpu": cpu, **({"logging": {"a row": LOGGING[:]}} if LOGGING else {})}


def counted(step: Step, net: Problem, device: torch.device) -> list[int]:
    """Operators, host reads and collectives of a step, medians of five steps in a row.

    Few steps are unlike the others: a balancer's watches read at the 8th, 16th, 32nd, ...
    """
    found = []
    for _ in range(5):
        x, y = net.draw(device)
        with counting() as counts:
            step(x, y)
        found.append((counts.operators, counts.reads, counts.collectives))
    return [statistics.median_low(column) for column in zip(*found, strict=True)]


def peak(make: Callable[[], tuple[Step, Problem]], device: torch.device) -> float:
    """MB at the peak of three steps, network and gradients included."""
    with PeakMemory() as memory:
        step, net = make()
        for _ in range(3):
            step(*net.draw(device))
    return memory.megabytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the command ---------------------------------------------------------------------------------


def launch(heads: str, engine: str, ranks: int, arguments: argparse.Namespace) -> dict[str, Cell]:
    """One table, measured in new processes: a cell for each number of tasks."""
    options = ["--worker", "--heads", heads, "--engine", engine, "--ranks", str(ranks)]
    options += ["--tasks", *map(str, arguments.tasks), "--variants", *arguments.variants]
    options += ["--batch", str(arguments.batch)] if arguments.batch else []
    for name in ("rounds", "warmup", "threads"):
        options += [f"--{name}", str(getattr(arguments, name))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(launcher if engine != "plain" else []), __file__, *options]
    environment = {**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(arguments.threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            cells: dict[str, Cell] = json.loads(line.removeprefix("RESULT "))
            return cells
    raise SystemExit(done.stdout + done.stderr)


def row(name: str, cell: Cell) -> list[str]:
    """The columns of one variant, paired with the plain step."""
    wall, plain = cell["wall"][name], cell["wall"][PLAIN]
    ratio, error = median_and_error([a / b for a, b in zip(wall, plain, strict=True)])
    cpu, _ = median_and_error([a / b for a, b in zip(cell["cpu"][name], cell["cpu"][PLAIN], strict=True)])
    more, more_error = median_and_error([a - b for a, b in zip(wall, plain, strict=True)])
    if name == PLAIN:
        shown = ["1", "1", "0"]
    else:
        shown = [f"{ratio:.3f} ± {error:.3f}", f"{cpu:.3f}", f"{more:.2f} ± {more_error:.2f}"]
    memory = cell["memory"][name] / cell["memory"][PLAIN]
    return [*shown, f"{memory:.3f}", *map(str, cell["counts"][name])]


def table(heads: str, engine: str, ranks: int, cells: dict[str, Cell], command: str) -> str:
    """One table in Markdown, with what it needs to be understood alone."""
    about = ", ".join(f"{key} {value}" for key, value in facts().items())
    lines = [f"## Heads: {heads}. Engine: {engine}. Ranks: {ranks}", "", f"`{command}`", "", f"{about}."]
    for tasks, cell in cells.items():
        wall, cpu = (statistics.median(cell[kind][PLAIN]) for kind in ("wall", "cpu"))
        rounds = len(cell["wall"][PLAIN])
        lines += [
            "",
            f"{tasks} tasks, {rounds} rounds. The plain step takes {wall:.1f} ms, {cpu:.1f} ms of "
            f"CPU time and {cell['memory'][PLAIN]:.0f} MB at its peak.",
            "",
            f"| n = {tasks} | " + " | ".join(COLUMNS) + " |",
            "|---|" + "---:|" * len(COLUMNS),
            *(f"| {name} | " + " | ".join(row(name, cell)) + " |" for name in cell["wall"]),
        ]
        if "logging" in cell:
            lines += ["", f"A row of the log takes {statistics.median(cell['logging']['a row']):.2f} ms."]
        if cell["notes"]:
            lines += ["", *left_out_lines(cell["notes"])]
    return "\n".join(lines) + "\n"


def wanted(arguments: argparse.Namespace) -> list[tuple[str, str, int]]:
    """The tables to make: heads, engine, ranks. Plain torch runs on one rank."""
    tables = list(itertools.product(arguments.heads, arguments.engine, arguments.ranks))
    found = [table for table in tables if table[1] != "plain" or table[2] == 1]
    if not found:
        raise SystemExit("overhead.py: plain torch runs on one rank, got --engine plain --ranks 2: take ddp")
    return found


def parser() -> argparse.ArgumentParser:
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("--heads", nargs="+", default=list(PROBLEMS), choices=PROBLEMS)
    parsed.add_argument("--tasks", nargs="+", type=int, default=[8])
    parsed.add_argument("--engine", nargs="+", default=["plain"], choices=ENGINES)
    parsed.add_argument("--ranks", nargs="+", type=int, default=[1], choices=[1, 2])
    parsed.add_argument("--rounds", type=int, default=40)
    parsed.add_argument("--warmup", type=int, default=2, help="rounds before those that count")
    parsed.add_argument(
        "--variants",
        nargs="+",
        default=list(VARIANTS),
        choices=[*ALL, "all"],
        metavar="NAME",
        help=f"of {', '.join(ALL)}; or `all`",
    )
    parsed.add_argument("--batch", type=int, help="samples a rank; the default depends on the heads")
    parsed.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parsed.add_argument("--out", type=Path, default=RESULTS)
    parsed.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parsed


def main() -> None:
    arguments = parser().parse_args()
    if "all" in arguments.variants:
        arguments.variants = list(ALL)
    if arguments.worker:
        worker(arguments)
        return
    arguments.variants = list(dict.fromkeys([PLAIN, *arguments.variants]))
    command = shlex.join(["python", "benchmarks/overhead.py", *sys.argv[1:]])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for heads, engine, ranks in wanted(arguments):
        text = table(heads, engine, ranks, launch(heads, engine, ranks, arguments), command)
        with (arguments.out / "overhead.md").open("a", encoding="utf-8") as file:
            file.write("\n" + text)
        print(text, flush=True)


if __name__ == "__main__":
    main()

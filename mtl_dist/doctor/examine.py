"""The checks. Each line says what was found, and what to change if there is a problem."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from mtl_dist.doctor.trial import run_trial, time_all_reduce
from mtl_dist.doctor.versions import version_problems, versions_text
from mtl_dist.integrations.accelerate import data_parallel_group, start

_SLOW_MS = 5.0  # Gloo within an idle node takes 0.4 ms


@dataclass(frozen=True)
class Line:
    """The result of one check.

    Attributes:
        verdict: "ok", "warn" or "FAIL".
        name: name of the check.
        detail: what was found.
        advice: what to change; empty if there is nothing to change.
    """

    verdict: str
    name: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        advice = f"\n{'':15}-> {self.advice}" if self.advice else ""
        return f"{self.verdict:<5}{self.name:<10}{self.detail}{advice}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist doctor`."""
    parser.add_argument(
        "--num-processes",
        type=int,
        help="expected number of processes (default: that of the launcher)",
    )


def run_command(arguments: argparse.Namespace) -> int:
    """Runs the checks and prints them on the main process. Every process returns 1 if a check failed."""
    lines: list[Line] = []
    main = int(os.environ.get("RANK", "0")) == 0
    for line in examine(arguments.num_processes):
        lines.append(line)
        if main:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    failed = sum(line.verdict == "FAIL" for line in lines)
    warned = sum(line.verdict == "warn" for line in lines)
    if main:
        sys.stdout.write(_verdict(failed, warned))
    elif failed:
        time.sleep(2)  # a launcher kills all processes when one ends: the main process must print first
    return 1 if failed else 0


def examine(num_processes: int | None) -> Iterator[Line]:
    """The lines, one per check. If the launch itself fails, there are no further checks."""
    problems = version_problems()
    yield Line("FAIL" if problems else "ok", "versions", versions_text(), "; ".join(problems))
    try:
        accelerator = start(num_processes)
    except (RuntimeError, ValueError, ImportError) as error:
        yield Line("FAIL", "launch", "the launcher did not start what was asked for", str(error))
        return
    yield from _launch(accelerator)
    yield from _try(accelerator)
    yield _reduction(accelerator)
    accelerator.end_training()


def _launch(accelerator: Accelerator) -> Iterator[Line]:
    started, kind = accelerator.num_processes, accelerator.distributed_type.value
    precision = accelerator.mixed_precision
    detail = f"{started} process(es), {kind}, {accelerator.device.type}, mixed precision {precision}"
    yield Line("ok", "launch", detail)
    visible = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if accelerator.device.type == "cpu" and visible:
        advice = "to use them, unset ACCELERATE_USE_CPU or remove cpu=True"
        yield Line(
            "warn", "devices", f"{visible} accelerator(s) are visible, but the run is on the CPU", advice
        )
    elif visible > local:
        advice = f"start {visible} processes on this machine, or hide the others (CUDA_VISIBLE_DEVICES)"
        yield Line(
            "warn", "devices", f"{visible} accelerators are visible, but only {local} are used", advice
        )
    if accelerator.gradient_accumulation_steps > 1:
        steps = accelerator.gradient_accumulation_steps
        advice = f"for one set of weights per optimizer step, use Balancer(window={steps})"
        yield Line("warn", "window", f"the launcher accumulates {steps} micro-batches", advice)


def _try(accelerator: Accelerator) -> Iterator[Line]:
    try:
        data_parallel_group(accelerator)
        trial = run_trial(accelerator)
    except Exception as error:
        # an engine may raise anything, and this command reports it
        advice = (
            "the engine could not train a small model that calls the balancer in its forward; see the error"
        )
        yield Line("FAIL", "training", f"{type(error).__name__}: {error}", advice)
        return
    ranks = accelerator.num_processes
    detail = f"{ranks} rank(s) against one process: weights differ by {trial.error:.1e}"
    right = trial.error <= trial.tolerance
    advice = (
        f"more than the {trial.tolerance:.0e} that {accelerator.mixed_precision!r} precision explains: ranks "
        "do not train with the same gradients. Check the launch line above, and the engine's gradient "
        "clipping, loss scaling and accumulation"
    )
    yield Line("ok" if right else "FAIL", "training", detail, "" if right else advice)
    same = "bitwise the same weights" if trial.agree else "different weights"
    yield Line(
        "ok" if trial.agree else "FAIL",
        "agreement",
        f"all ranks have {same}",
        "" if trial.agree else "ranks have different hardware or versions: make them equal",
    )


def _reduction(accelerator: Accelerator) -> Line:
    if accelerator.num_processes == 1:
        return Line("ok", "sync", "one process: nothing to reduce")
    median, late = time_all_reduce(accelerator)
    detail = f"a step's all-reduce takes {median:.2f} ms (95 % below {late:.2f} ms)"
    if median <= _SLOW_MS:
        return Line("ok", "sync", detail)
    advice = (
        "slow for 0.5 kB: check the network interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME) and the "
        "load of the CPUs (OMP_NUM_THREADS=1), or update the weights only every k-th step (rule "
        "{name: every, interval: k, ...})"
    )
    return Line("warn", "sync", detail, advice)


def _verdict(failed: int, warned: int) -> str:
    if failed:
        return f"\n{failed} failure(s): this launch does not train what you asked for\n"
    return f"\nno failures{f', {warned} warning(s)' if warned else ''}\n"

"""The checks. Each line says what was found, and what to change if there is a problem."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from mtl_dist.doctor.facts import compare, gather_facts
from mtl_dist.doctor.line import Line
from mtl_dist.doctor.machines import examine_machines
from mtl_dist.doctor.trial import run_trial, time_all_reduce
from mtl_dist.doctor.versions import version_problems, versions_text
from mtl_dist.integrations.accelerate import data_parallel_group, start
from mtl_dist.integrations.compiling import stale_locks
from mtl_dist.training.settings import Settings, load_settings
from mtl_dist.training.storage import check_shared
from mtl_dist.training.together import RunError, everyone

# what all ranks find, so that one of them says it
_SAME_EVERYWHERE = ("machines", "code", "packages", "settings", "processes", "interface", "agreement")
_WAIT_MINUTES = 10.0
_SLOW_MS = 5.0  # Gloo within an idle node takes 0.4 ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `mtl-dist doctor`."""
    parser.add_argument(
        "--num-processes",
        type=_positive(int),
        help="expected number of processes (default: that of the launcher)",
    )
    together = parser.add_argument_group(
        "before a training on several machines",
        "run it on each of them, without a launcher: they meet at the head and compare what they have",
    )
    together.add_argument("--machines", type=_positive(int), help="number of machines")
    together.add_argument("--head", metavar="HOST:PORT", help="one of them, where they meet")
    together.add_argument("--engine", metavar="FILE", help="the engine's file, to compare")
    together.add_argument(
        "--wait-minutes", type=_positive(float), help="for the other machines (default: 10)"
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="what will be trained, to compare")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="its settings")


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """Reads an argument that counts or measures something."""

    def read(text: str) -> float:
        if not 0 < (value := kind(text)) < math.inf:
            raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
        return value

    read.__name__ = "number"  # argparse shows it for what is none
    return read


def run_command(arguments: argparse.Namespace) -> int:
    """Runs the checks and prints them on the main process. Every process returns 1 if a check failed.

    What fails on another process only, that process prints.
    """
    if (arguments.machines is None) != (arguments.head is None):
        sys.stderr.write("mtl-dist doctor: give both --machines and --head, or none of them\n")
        return 2
    if arguments.machines is None and (arguments.engine, arguments.wait_minutes) != (None, None):
        sys.stderr.write("mtl-dist doctor: --engine and --wait-minutes go with --machines and --head\n")
        return 2
    lines: list[Line] = []
    main = int(os.environ.get("RANK", "0")) == 0
    told: set[str] = set()
    for line in examine(arguments):
        lines.append(line)
        if main:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
        elif line.verdict == "FAIL" and line.name not in _SAME_EVERYWHERE:
            told.add(f"rank {os.environ['RANK']} on {socket.gethostname()}: {line}\n")
    failed = sum(line.verdict == "FAIL" for line in lines)
    warned = sum(line.verdict == "warn" for line in lines)
    if main:
        sys.stdout.write(_verdict(failed, warned))
    elif failed:
        sys.stdout.write("".join(sorted(told)))
        sys.stdout.flush()
        time.sleep(2)  # a launcher kills all processes when one ends: the main process must print first
    return 1 if failed else 0


def examine(arguments: argparse.Namespace) -> Iterator[Line]:
    """The lines, one per check. If the launch itself fails, there are no further checks."""
    problems = version_problems()
    yield Line("FAIL" if problems else "ok", "versions", versions_text(), "; ".join(problems))
    try:
        settings = load_settings(arguments.config, arguments.overrides) if arguments.config else None
    except ValueError as error:
        yield Line("FAIL", "settings", "they are wrong", str(error))
        return
    if arguments.machines is not None:
        yield from _before_start(arguments, settings)
        return
    for lock in stale_locks():
        advice = f"delete it, unless another machine is compiling just now: rm '{lock}'"
        yield Line(
            "warn", "compile", "an interrupted compilation left a lock, for which launches wait", advice
        )
    try:
        accelerator = start(arguments.num_processes)
    except (RuntimeError, ValueError, ImportError) as error:
        yield Line("FAIL", "launch", "the launcher did not start what was asked for", str(error))
        return
    yield from _launch(accelerator)
    yield from _machines(accelerator, settings)
    yield from _try(accelerator)
    yield _reduction(accelerator)
    accelerator.end_training()


def _before_start(arguments: argparse.Namespace, settings: Settings | None) -> Iterator[Line]:
    try:
        engine = "" if arguments.engine is None else Path(arguments.engine).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        yield Line("FAIL", "engine", f"{arguments.engine!r} cannot be read", str(error))
        return
    text = "" if settings is None else settings.model_dump_json() + engine
    number = arguments.num_processes
    processes = "" if number is None else f"{number} in all, {_devices()} device(s) on each machine"
    mine = gather_facts(text, processes, arguments.head.rpartition(":")[0])
    folder = None if settings is None else settings.output_dir
    seconds = 60 * (arguments.wait_minutes or _WAIT_MINUTES)
    yield from examine_machines(arguments.head, arguments.machines, mine, folder, seconds)


def _machines(accelerator: Accelerator, settings: Settings | None) -> Iterator[Line]:
    """What the machines of a started job have in common."""
    mine = gather_facts(processes=os.environ.get("LOCAL_WORLD_SIZE", ""))
    told = everyone(accelerator, mine if accelerator.is_local_main_process else None)
    machines = [facts for facts in told if facts is not None]
    if len(machines) > 1:
        yield from compare(machines)
    if settings is not None and accelerator.num_processes > 1:
        try:
            settings.output_dir.mkdir(parents=True, exist_ok=True)
            check_shared(accelerator, settings.output_dir)
        except (OSError, RunError) as error:
            yield Line("FAIL", "output", "the ranks do not share output_dir", str(error))
        else:
            yield Line("ok", "output", f"all ranks see one folder {str(settings.output_dir)!r}")


def _devices() -> int:
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _launch(accelerator: Accelerator) -> Iterator[Line]:
    started, kind = accelerator.num_processes, accelerator.distributed_type.value
    precision = accelerator.mixed_precision
    detail = f"{started} process(es), {kind}, {accelerator.device.type}, mixed precision {precision}"
    yield Line("ok", "launch", detail)
    visible = _devices()
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

"""The price of one more meeting of the ranks, on a network with a delay, and beside a slow rank.

    python benchmarks/latency.py                              # as root; 20 minutes on 2 cores
    python benchmarks/latency.py --ranks 2 --delays 0 1 --jitter 0 --rounds 3

Every rank runs in a network namespace of its own; a switch in user space hands each frame on after a constant
time (lab.py). The trunk sleeps for `--work` ms in the forward and twice as long in the backward, as the host
does while an accelerator works, so that two cores can be up to four machines. With `--jitter 0.1` the last
rank sleeps longer: at random, by 10 % on average and 20 % at most, in every forward and in every backward.
With `--slow all` every rank does so, independently.

In each round every variant takes eleven steps in a row, in an order that changes from round to round. Ten of
them count, so that weights that follow from the step before have to be waited for, and `Every(10, MGDA)`
measures once. The table shows milliseconds per step beyond the plain DDP step of the same round, medians over
rounds, ± half of their 95 % intervals. "a + b x delay" is the line through the medians of a row, by least
squares. Tables are appended to benchmarks/results/latency.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from engines import LEARNING_RATE
from lab import Lab
from problems import Linear, Shape
from tables import RESULTS, facts, left_out_lines, median_and_error
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from variants import AGAIN, BALANCED, MEETING, MORE, PLAIN, left_out

SHAPE = Shape(tasks=4, batch=16, width=64, depth=2, features=32)
BARE = "bare all-reduce"
WEIGHTED = (
    "losses only, InverseLoss",
    "FeatureProbe, MGDA",
    "FeatureTap, MGDA",
    "FeatureProbe, Every(10, MGDA)",
    *(name for name in BALANCED if name.startswith("lag=1")),
)
VARIANTS = (BARE, PLAIN, AGAIN, MEETING, *WEIGHTED)
STEPS = 10  # that count in a turn, after one that does not
Taken = dict[str, list[float]]


class Work(nn.Module):
    """The time that an accelerator would take for the trunk.

    Args:
        forward: seconds in the forward; the backward takes twice as long.
        jitter: by which part each of the two is longer on average, at random and at most by twice that.
        seed: of the randomness.
    """

    def __init__(self, forward: float, jitter: float, seed: int) -> None:
        super().__init__()
        self._seconds = forward
        self._jitter = jitter
        self._random = random.Random(seed)

    def forward(self, z: Tensor) -> Tensor:
        """The same numbers, later."""
        slept: Tensor = _Slept.apply(z, self)
        return slept

    def sleep(self, times: int) -> None:
        """Sleeps for `times` forwards."""
        time.sleep(times * self._seconds * (1 + self._random.uniform(0, 2 * self._jitter)))


class _Slept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, work: Work) -> Tensor:
        ctx.work = work
        work.sleep(1)
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        ctx.work.sleep(2)
        return grad, None


# ---- the ranks -----------------------------------------------------------------------------------


def worker(arguments: argparse.Namespace) -> None:
    """Measures on one rank; rank 0 prints one JSON line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    taken = measured(arguments)
    if dist.get_rank() == 0:
        sys.stdout.write("RESULT " + json.dumps(taken) + "\n")
    dist.barrier()
    dist.destroy_process_group()


def measured(arguments: argparse.Namespace) -> Taken:
    """Milliseconds per step of every variant, by round. The models are gone when it returns."""
    steps = {name: make_step(name, arguments) for name in arguments.variants}
    order = random.Random(0)
    taken: Taken = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name in order.sample(list(steps), len(steps)):
            dist.barrier()
            steps[name]()
            start = time.perf_counter()
            for _ in range(STEPS):
                steps[name]()
            if number:  # the first round is a warm-up
                taken[name].append(1e3 * (time.perf_counter() - start) / STEPS)
    return taken


def make_step(name: str, arguments: argparse.Namespace) -> Callable[[], None]:
    """One training step of a variant, or one all-reduce of a few numbers."""
    if name == BARE:
        numbers = torch.zeros(64, dtype=torch.float64)
        return lambda: dist.all_reduce(numbers)
    torch.manual_seed(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    slow = arguments.jitter[0] if arguments.slow == "all" or rank == ranks - 1 else 0.0
    net = Linear(SHAPE)
    net.trunk = nn.Sequential(net.trunk, Work(arguments.work / 1e3, slow, seed=rank))
    net.meets = name == MEETING
    if name in WEIGHTED:
        net.balancer = (BALANCED | MORE)[name].balancer(net.tasks)
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

    def step() -> None:
        optimizer.zero_grad()
        model(*net.draw(torch.device("cpu"))).backward()
        optimizer.step()

    return step


# ---- the command ---------------------------------------------------------------------------------


def launch(ranks: int, delay: float, jitter: float, arguments: argparse.Namespace) -> Taken:
    """Measures in a new lab with one rank on each host; `delay` in ms."""
    options = ["--worker", "--jitter", str(jitter), "--slow", arguments.slow, "--work", str(arguments.work)]
    options += ["--rounds", str(arguments.rounds), "--variants", *arguments.variants]
    with Lab(ranks, delay / 1e3) as lab, tempfile.TemporaryDirectory() as folder:
        common = {"MASTER_ADDR": lab.address(0), "MASTER_PORT": "29500", "WORLD_SIZE": str(ranks)}
        common |= {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
        outputs = [Path(folder, f"rank_{rank}") for rank in range(ranks)]
        processes = []
        for rank, path in enumerate(outputs):
            with path.open("w", encoding="utf-8") as output:
                environment = {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": "0"}
                command = [sys.executable, __file__, *options]
                processes.append(lab.popen(rank, command, environment, output.fileno()))
        codes = ended(processes, arguments.timeout)
        texts = [path.read_text(encoding="utf-8") for path in outputs]
    found = [line.removeprefix("RESULT ") for line in texts[0].splitlines() if line.startswith("RESULT ")]
    if any(codes) or not found:
        raise SystemExit("\n".join([*texts, f"latency.py: the ranks ended with {codes} (-9: killed here)"]))
    taken: Taken = json.loads(found[0])
    return taken


def ended(processes: list[subprocess.Popen[str]], timeout: float) -> list[int]:
    """The exit codes. Where one process fails, or after `timeout` seconds, the others are killed."""
    try:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if any(codes) or None not in codes:
                break
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
    return [process.wait() for process in processes]


def beyond_plain(name: str, taken: Taken) -> list[float]:
    """Ms per step beyond the plain step of the same round; for the bare all-reduce and the plain step, ms."""
    if name in (BARE, PLAIN):
        return taken[name]
    return [a - b for a, b in zip(taken[name], taken[PLAIN], strict=True)]


def line_through(delays: Sequence[float], medians: Sequence[float]) -> str:
    """`a + b x delay`, by least squares."""
    if len(set(delays)) < 2:
        return "-"
    slope, start = np.polyfit(delays, medians, 1)
    sign = "-" if slope < 0 else "+"
    return f"{start:.1f} {sign} {abs(slope):.1f} x delay"


def table(title: str, by_delay: dict[float, Taken], command: str, notes: list[str]) -> str:
    """One number of ranks and one jitter, in Markdown."""
    about = ", ".join(f"{key} {value}" for key, value in facts().items())
    rounds = min(len(taken[PLAIN]) for taken in by_delay.values())
    lines = [
        f"## {title}",
        "",
        f"`{command}`",
        "",
        f"{about}. {rounds} rounds. ms per step: of the first two rows itself, of the others what they take "
        "beyond the plain step.",
        "",
        "| one-way delay | " + " | ".join(f"{delay:g} ms" for delay in by_delay) + " | a + b x delay |",
        "|---|" + "---:|" * (len(by_delay) + 1),
    ]
    for name in next(iter(by_delay.values())):
        found = [median_and_error(beyond_plain(name, taken)) for taken in by_delay.values()]
        cells = [f"{median:.2f} ± {error:.2f}" for median, error in found]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {line_through(list(by_delay), [m for m, _ in found])} |"
        )
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def parser() -> argparse.ArgumentParser:
    """The options."""
    parsed = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parsed.add_argument("--ranks", nargs="+", type=int, default=[2, 4], choices=[2, 3, 4])
    parsed.add_argument("--delays", nargs="+", type=float, default=[0, 0.2, 1, 5], help="one way, ms")
    parsed.add_argument("--jitter", nargs="+", type=float, default=[0, 0.1], help="of slow ranks")
    parsed.add_argument("--slow", choices=["last", "all"], default="last", help="which ranks have jitter")
    parsed.add_argument("--work", type=float, default=10, help="ms that the trunk sleeps in the forward")
    parsed.add_argument("--rounds", type=int, default=8)
    parsed.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parsed.add_argument("--timeout", type=float, default=900, help="seconds for one delay")
    parsed.add_argument("--out", type=Path, default=RESULTS)
    parsed.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parsed


def main() -> None:
    arguments = parser().parse_args()
    if arguments.worker:
        worker(arguments)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the lab is taken down
    wanted = list(dict.fromkeys([PLAIN, *arguments.variants]))
    reasons = {name: reason for name in wanted if (reason := left_out(name, "ddp", ranks=2))}
    arguments.variants = [name for name in VARIANTS if name in wanted and name not in reasons]
    notes = left_out_lines(reasons)
    command = shlex.join(["python", "benchmarks/latency.py", *sys.argv[1:]])
    arguments.out.mkdir(parents=True, exist_ok=True)
    for ranks in arguments.ranks:
        for jitter in arguments.jitter:
            by_delay = {delay: launch(ranks, delay, jitter, arguments) for delay in arguments.delays}
            slow = f"{arguments.slow} slower by {jitter:.0%}" if jitter else "none slower"
            text = table(f"{ranks} ranks, {slow}", by_delay, command, notes)
            with (arguments.out / "latency.md").open("a", encoding="utf-8") as file:
                file.write("\n" + text)
            print(text, flush=True)


if __name__ == "__main__":
    main()

"""The cost of a balanced step relative to a plain step: time and peak memory, paired in one run.

    python benchmarks/overhead.py                            # all columns, all variants
    python benchmarks/overhead.py --columns 1:torch 2:ddp --rounds 40 --variants plain "FeatureProbe, MGDA"

A column is a number of ranks and an engine: plain torch on one rank; DDP, FSDP2 (the parameters of the heads
stay gathered between forward and backward, or are resharded) and DeepSpeed ZeRO-2 on two ranks.

Each round takes one step of each variant, in an order that changes from round to round. The table shows the
median over rounds of time / (time of the plain step in the same round). Peak memory is the memory of a
process that runs only one variant, minus its memory before the model was created. Writes overhead.md and
overhead.json into benchmarks/results/.

The plain step is the same model under the same engine, with a plain sum of its losses. "And the ranks meet"
is the plain step with one all-reduce of its losses after the heads; its result is not used. This is the
minimal cost of weights on which all ranks agree before the backward. Most of it is the wait for the slower
rank. No engine works correctly with TorchJD and "one backward a task". They run on the bare model, are
compared only with plain torch and DDP, and average gradients over ranks in one all-reduce afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from engines import ENGINES, LEARNING_RATE, Step, engine_step, start
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.probes import Probe
from mtl_dist.tracking import JsonlTracker, RunInfo, RunLog
from mtl_dist.weighting import (
    FAMO,
    MGDA,
    RLW,
    Every,
    GeometricMean,
    InverseGradNorm,
    InverseLoss,
    Rule,
    Uncertainty,
    UPGrad,
)

LOGGING: list[float] = []  # milliseconds that the host spends on logging, per logged step
RESULTS = Path(__file__).parent / "results"
CLASSES = 10


@dataclass(frozen=True)
class Shape:
    """Size of the problem; the defaults give a trunk of 5.3 million parameters."""

    tasks: int = 8
    batch: int = 256
    width: int = 1024
    depth: int = 5
    features: int = 512


class Net(nn.Module):
    """An MLP trunk and one linear head per task."""

    def __init__(self, shape: Shape, balancer: Balancer | None, *, meets: bool = False) -> None:
        super().__init__()
        self.meets = meets
        widths = [shape.features, *[shape.width] * shape.depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Linear(shape.width, shape.features))
        self.heads = nn.ModuleList(nn.Linear(shape.features, CLASSES) for _ in range(shape.tasks))
        self.balancer = balancer

    def loss(self, i: int, z: Tensor, labels: Tensor) -> Tensor:
        """The loss of one task."""
        return F.cross_entropy(self.heads[i](z), labels[:, i])

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and the loss of each task."""
        z = self.trunk(x)
        return z, [self.loss(i, z, labels) for i in range(len(self.heads))]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The scalar to differentiate."""
        if self.balancer is None:
            losses = self.losses(x, labels)[1]
            if self.meets:
                dist.all_reduce(torch.stack([loss.detach() for loss in losses]).double())
            return sum(losses, torch.zeros((), device=x.device))
        heads = {str(i): (lambda z, i=i: self.loss(i, z, labels)) for i in range(len(self.heads))}
        return self.balancer(self.trunk(x), heads)


@dataclass(frozen=True)
class Balanced:
    """A rule with its probe."""

    rule: Rule
    probe: Probe | None = None
    logged: bool = False


BALANCED: dict[str, Balanced] = {
    "losses only, GeometricMean": Balanced(GeometricMean()),
    "losses only, InverseLoss": Balanced(InverseLoss()),
    "losses only, Uncertainty": Balanced(Uncertainty()),
    "losses only, FAMO": Balanced(FAMO()),
    "losses only, RLW": Balanced(RLW()),
    "FeatureTap, MGDA": Balanced(MGDA(), FeatureTap()),
    "FeatureTap, InverseGradNorm": Balanced(InverseGradNorm(), FeatureTap()),
    "FeatureProbe, MGDA": Balanced(MGDA(), FeatureProbe()),
    "FeatureProbe, MGDA, logged": Balanced(MGDA(), FeatureProbe(), logged=True),
    "FeatureProbe, InverseGradNorm": Balanced(InverseGradNorm(), FeatureProbe()),
    "FeatureProbe, UPGrad": Balanced(UPGrad(), FeatureProbe()),
    "FeatureProbe, Every(10, MGDA)": Balanced(Every(MGDA(), 10), FeatureProbe()),
    "FeatureProbe(reevaluate), MGDA": Balanced(MGDA(), FeatureProbe(reevaluate=True)),
}
AGAIN = "plain, again"  # shows the noise
MEETING = "plain, and the ranks meet"
BASELINES = ("plain", AGAIN, MEETING, "torchjd mtl_backward, MGDA", "one backward a task")
VARIANTS = (*BASELINES[:3], *BALANCED, *BASELINES[3:])
COLUMNS = ("1:torch", "2:ddp", "2:fsdp2", "2:fsdp2-reshard", "2:zero-2")


def make_step(name: str, shape: Shape, device: torch.device, engine: str) -> Step:
    """One training step of a variant, including the optimizer."""
    torch.manual_seed(0)
    variant = BALANCED.get(name)
    tasks = [str(i) for i in range(shape.tasks)]
    balancer = None if variant is None else Balancer(tasks, variant.rule, probe=variant.probe)
    net = Net(shape, balancer, meets=name == MEETING).to(device)
    if name == "torchjd mtl_backward, MGDA":
        return _bare(net, _torchjd(net))
    if name == "one backward a task":
        return _bare(net, _one_backward_a_task)
    step = engine_step(engine, net, balancer)
    return step if balancer is None or not variant.logged else _logged(step, balancer)


def _logged(step: Step, balancer: Balancer) -> Step:
    """The step and its row; rank 0 writes the row to a file, as the training program does."""
    trackers = [JsonlTracker()] if not dist.is_initialized() or dist.get_rank() == 0 else []
    log = RunLog(trackers, RunInfo(Path(tempfile.mkdtemp()), balancer.tasks, {})).__enter__()
    numbers = itertools.count(1)

    def logged(x: Tensor, labels: Tensor) -> None:
        step(x, labels)
        start = time.perf_counter()
        log.add(balancer.report)
        log.step(next(numbers), {"perf/step_ms": 1.0})
        LOGGING.append(1e3 * (time.perf_counter() - start))

    return logged


def _bare(net: Net, backward: Callable[[Tensor, list[Tensor]], None]) -> Step:
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        z, losses = net.losses(x, labels)
        backward(z, losses)
        if dist.is_initialized():
            flat = torch.cat([p.grad.flatten() for p in net.parameters()])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            pieces = flat.split([p.numel() for p in net.parameters()])
            for parameter, piece in zip(net.parameters(), pieces, strict=True):
                parameter.grad.copy_(piece.view_as(parameter))
        optimizer.step()

    return step


def _torchjd(net: Net) -> Callable[[Tensor, list[Tensor]], None]:
    from torchjd import aggregation, autojac

    aggregator = aggregation.MGDA()
    shared = list(net.trunk.parameters())

    def backward(z: Tensor, losses: list[Tensor]) -> None:
        autojac.mtl_backward(losses, z)
        autojac.jac_to_grad(shared, aggregator)

    return backward


def _one_backward_a_task(z: Tensor, losses: list[Tensor]) -> None:
    for loss in losses[:-1]:
        loss.backward(retain_graph=True)
    losses[-1].backward()


# ---- the measuring processes ---------------------------------------------------------------------


def worker(arguments: argparse.Namespace) -> None:
    """Measures on every rank; rank 0 prints one JSON line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    num_ranks, engine = arguments.columns[0]
    start(engine, num_ranks, device)
    shape = Shape(tasks=arguments.tasks, batch=arguments.batch)
    result = (
        memory(arguments.variants[0], shape, device, engine)
        if arguments.memory
        else times(arguments, shape, device, engine)
    )
    if not dist.is_initialized() or dist.get_rank() == 0:
        sys.stdout.write("RESULT " + json.dumps(result) + "\n")
    if dist.is_initialized():
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()


def batch(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape.batch, shape.features, device=device)
    return x, torch.randint(CLASSES, (shape.batch, shape.tasks), device=device)


def times(
    arguments: argparse.Namespace, shape: Shape, device: torch.device, engine: str
) -> dict[str, list[float]]:
    """Milliseconds of every step of every variant, round by round."""
    names = arguments.variants
    steps = {name: make_step(name, shape, device, engine) for name in names}
    order = random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(arguments.rounds + arguments.warmup):
        for name in order.sample(names, len(names)):
            x, labels = batch(shape, device)
            if dist.is_initialized():
                dist.barrier()
            _wait(device)
            start = time.perf_counter()
            steps[name](x, labels)
            _wait(device)
            if number >= arguments.warmup:
                taken[name].append(1e3 * (time.perf_counter() - start))
    return taken | ({"logging": LOGGING[-arguments.rounds :]} if LOGGING else {})


def memory(name: str, shape: Shape, device: torch.device, engine: str) -> float:
    """Peak memory in MB of a few steps of one variant, minus the memory before them.

    A tiny step comes first, so that imports and one-time initialisation do not count.
    """
    tiny = Shape(tasks=2, batch=2, width=4, depth=1, features=4)
    make_step("FeatureProbe, MGDA", tiny, device, engine)(*batch(tiny, device))
    make_step(name, tiny, device, engine)(*batch(tiny, device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(name, shape, device, engine)
    for _ in range(4):
        step(*batch(shape, device))
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the command ---------------------------------------------------------------------------------


def launch(
    column: tuple[int, str], arguments: argparse.Namespace, *, variants: list[str], memory: bool
) -> Any:
    world_size, engine = column
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    options = ["--worker", "--columns", f"{world_size}:{engine}", "--tasks", str(arguments.tasks)]
    options += [
        "--batch",
        str(arguments.batch),
        "--rounds",
        str(arguments.rounds),
        "--warmup",
        str(arguments.warmup),
    ]
    options += [
        "--threads",
        str(arguments.threads),
        "--variants",
        *variants,
        *(["--memory"] if memory else []),
    ]
    command = [sys.executable, *(launcher if world_size > 1 else []), __file__, *options]
    # freed blocks return to the system at once, so that resident memory follows the used memory
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if memory else {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), **trimmed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(done.stdout + done.stderr)


def ratios(taken: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of the time of each variant / (time of the plain step in the same round)."""
    return {name: statistics.median(values) for name, values in by_round(taken).items()}


def errors(taken: dict[str, list[float]]) -> dict[str, float]:
    """Half of the 95 % interval of these medians, `1.57 IQR / √rounds` (McGill, Tukey and Larsen 1978)."""
    found = {}
    for name, values in by_round(taken).items():
        low, _, high = statistics.quantiles(values, n=4)
        found[name] = 1.57 * (high - low) / math.sqrt(len(values))
    return found


def by_round(taken: dict[str, list[float]]) -> dict[str, list[float]]:
    return {
        name: [a / b for a, b in zip(values, taken["plain"], strict=True)] for name, values in taken.items()
    }


def facts(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(tasks=arguments.tasks, batch=arguments.batch)
    trunk = sum(p.numel() for p in Net(shape, None).trunk.parameters())
    processor = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "trunk_parameters": trunk,
        "rounds": arguments.rounds,
        "threads_per_rank": arguments.threads,
        "batch_per_rank": arguments.batch,
        "tasks": arguments.tasks,
    }


def table(results: dict[str, Any]) -> str:
    columns = results["columns"]
    about = ", ".join(f"{key} {value}" for key, value in results["facts"].items())
    plain = ", ".join(f"{column['plain_ms']:.1f} ms on {name}" for name, column in columns.items())
    lines = [f"Ratios to the plain step ({plain}), ± half the 95 % interval. {about}."]
    for kind in ("time", "memory"):
        lines += ["", f"| {kind} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
        for name in dict.fromkeys(name for column in columns.values() for name in column[kind]):
            cells = " | ".join(_cell(column, kind, name) for column in columns.values())
            lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def _cell(column: dict[str, Any], kind: str, name: str) -> str:
    if name not in column[kind]:
        return "-"
    error = column["error"][name] if kind == "time" else 0.0
    return f"{column[kind][name]:.3f}" + (f" ± {error:.3f}" if error else "")


def parsed_column(text: str) -> tuple[int, str]:
    """Parses a column: `2:ddp` is two ranks under DDP."""
    ranks, _, engine = text.partition(":")
    if not ranks.isdigit() or engine not in ENGINES or (engine == "torch") != (ranks == "1"):
        raise argparse.ArgumentTypeError(f"must be RANKS:ENGINE, as {', '.join(COLUMNS)}; got {text!r}")
    return int(ranks), engine


def measured(column: tuple[int, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Time and memory of every variant that the engine supports, relative to its own plain step."""
    bare = column[1] in ("torch", "ddp")
    variants = [v for v in arguments.variants if v != MEETING or column[0] > 1]
    variants = [v for v in variants if bare or v in BALANCED or v in BASELINES[:3]]
    taken = launch(column, arguments, variants=variants, memory=False)
    peaks = {v: launch(column, arguments, variants=[v], memory=True) for v in variants}
    return {
        "plain_ms": statistics.median(taken["plain"]),
        "time": ratios(taken),
        "error": errors(taken),
        "memory": {name: peak / peaks["plain"] for name, peak in peaks.items()},
        "milliseconds": taken,
    }


def column_name(column: tuple[int, str]) -> str:
    return f"{column[0]} rank(s), {column[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    columns = [parsed_column(text) for text in COLUMNS]
    parser.add_argument(
        "--columns",
        type=parsed_column,
        nargs="+",
        default=columns,
        metavar="RANKS:ENGINE",
        help=f"default: {' '.join(COLUMNS)}",
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME")
    parser.add_argument("--tasks", type=int, default=Shape.tasks)
    parser.add_argument("--batch", type=int, default=Shape.batch, help="samples a rank")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads a rank")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    results: dict[str, Any] = {
        "facts": facts(arguments),
        "columns": {column_name(column): measured(column, arguments) for column in arguments.columns},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overhead.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "overhead.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

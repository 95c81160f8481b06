"""What a balanced step costs beside a plain one: time and peak memory, paired in one run.

    python benchmarks/overhead.py                         # 1 and 2 ranks, all variants
    python benchmarks/overhead.py --world-sizes 2 --rounds 40 --variants plain FeatureProbe torchjd

Every round takes one step of each variant, in an order that changes from round to round, and the table shows
the median over rounds of time / (time of the plain step in the same round). Peak memory is that of a process
that runs one variant alone, less what it held before the model was made. Writes overhead.md and overhead.json
into benchmarks/results/.

The plain step is the same model under the same engine with a plain sum of its losses. TorchJD and "one
backward a task" have no engine that is right with them, so they run on the bare model and average gradients
over ranks in one all-reduce afterwards.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

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

LOGGING: list[float] = []  # milliseconds of the host in the logging of each logged step
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
    """An MLP trunk and one linear head a task."""

    def __init__(self, shape: Shape, balancer: Balancer | None) -> None:
        super().__init__()
        widths = [shape.features, *[shape.width] * shape.depth]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Linear(shape.width, shape.features))
        self.heads = nn.ModuleList(nn.Linear(shape.features, CLASSES) for _ in range(shape.tasks))
        self.balancer = balancer

    def loss(self, i: int, z: Tensor, labels: Tensor) -> Tensor:
        """Of one task."""
        return F.cross_entropy(self.heads[i](z), labels[:, i])

    def losses(self, x: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The features, and the loss of each task."""
        z = self.trunk(x)
        return z, [self.loss(i, z, labels) for i in range(len(self.heads))]

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The scalar to differentiate."""
        if self.balancer is None:
            return sum(self.losses(x, labels)[1], torch.zeros((), device=x.device))
        heads = {str(i): (lambda z, i=i: self.loss(i, z, labels)) for i in range(len(self.heads))}
        return self.balancer(self.trunk(x), heads)


@dataclass(frozen=True)
class Balanced:
    """A rule and the probe it is measured with."""

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
BASELINES = ("plain", "torchjd mtl_backward, MGDA", "one backward a task")
VARIANTS = (BASELINES[0], *BALANCED, *BASELINES[1:])


def make_step(name: str, shape: Shape, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """One training step of a variant, optimizer included."""
    torch.manual_seed(0)
    variant = BALANCED.get(name)
    tasks = [str(i) for i in range(shape.tasks)]
    balancer = None if variant is None else Balancer(tasks, variant.rule, probe=variant.probe)
    net = Net(shape, balancer).to(device)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    if name == "torchjd mtl_backward, MGDA":
        return _bare(net, optimizer, _torchjd(net))
    if name == "one backward a task":
        return _bare(net, optimizer, _one_backward_a_task)
    model = DistributedDataParallel(net) if dist.is_initialized() else net

    def step(x: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        model(x, labels).backward()
        optimizer.step()

    return step if balancer is None or not variant.logged else _logged(step, balancer)


def _logged(step: Callable[[Tensor, Tensor], None], balancer: Balancer) -> Callable[[Tensor, Tensor], None]:
    """The step, and its row as the training program makes it: written by rank 0 into a file."""
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


def _bare(net: Net, optimizer: torch.optim.Optimizer, backward: Callable) -> Callable[[Tensor, Tensor], None]:
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        assert dist.get_world_size() == arguments.world_sizes[0]
    shape = Shape(tasks=arguments.tasks, batch=arguments.batch)
    result = (
        memory(arguments.variants[0], shape, device) if arguments.memory else times(arguments, shape, device)
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


def times(arguments: argparse.Namespace, shape: Shape, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of every step of every variant, round by round."""
    names = arguments.variants
    steps = {name: make_step(name, shape, device) for name in names}
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


def memory(name: str, shape: Shape, device: torch.device) -> float:
    """Peak MB of a few steps of one variant, above what the process held before.

    A tiny step comes first, so that what is imported or initialised once is not counted.
    """
    tiny = Shape(tasks=2, batch=2, width=4, depth=1, features=4)
    make_step("FeatureProbe, MGDA", tiny, device)(*batch(tiny, device))
    make_step(name, tiny, device)(*batch(tiny, device))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make_step(name, shape, device)
    for _ in range(4):
        step(*batch(shape, device))
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


# ---- the command ---------------------------------------------------------------------------------


def launch(world_size: int, arguments: argparse.Namespace, *, variants: list[str], memory: bool) -> Any:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    options = ["--worker", "--world-sizes", str(world_size), "--tasks", str(arguments.tasks)]
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
    # freed blocks go back to the system at once, so that resident memory follows what is held
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if memory else {}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), **trimmed}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(done.stdout + done.stderr)


def ratios(taken: dict[str, list[float]]) -> dict[str, float]:
    """Median over rounds of each variant's time over the plain one's in the same round."""
    plain = taken["plain"]
    return {
        name: statistics.median(a / b for a, b in zip(values, plain, strict=True))
        for name, values in taken.items()
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
    sizes = list(results["ranks"])
    header = "| variant | " + " | ".join(f"time, {w} rank(s) | memory, {w} rank(s)" for w in sizes) + " |"
    lines = [header, "|---|" + "---:|---:|" * len(sizes)]
    for name in results["ranks"][sizes[0]]["time"]:
        cells = (
            f"{results['ranks'][w]['time'][name]:.3f} | {results['ranks'][w]['memory'][name]:.3f}"
            for w in sizes
        )
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    about = ", ".join(f"{key} {value}" for key, value in results["facts"].items())
    plain = ", ".join(f"{results['ranks'][w]['plain_ms']:.1f} ms on {w}" for w in sizes)
    logging = ""
    for w in sizes:
        ms, step = results["ranks"][w]["logging_ms"], results["ranks"][w]["plain_ms"]
        if ms is not None:
            logging += (
                f" Logging a row takes {ms:.2f} ms of rank 0, {ms / step:.2%} of the plain step on {w}."
            )
    return f"Ratios to the plain step ({plain} rank(s)). {about}.{logging}\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2])
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
    results: dict[str, Any] = {"facts": facts(arguments), "ranks": {}}
    for world_size in arguments.world_sizes:
        taken = launch(world_size, arguments, variants=arguments.variants, memory=False)
        peaks = {v: launch(world_size, arguments, variants=[v], memory=True) for v in arguments.variants}
        logging = taken.pop("logging", [])
        results["ranks"][str(world_size)] = {
            "logging_ms": statistics.median(logging) if logging else None,
            "plain_ms": statistics.median(taken["plain"]),
            "time": ratios(taken),
            "memory": {name: peak / peaks["plain"] for name, peak in peaks.items()},
            "milliseconds": taken,
        }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "overhead.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "overhead.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

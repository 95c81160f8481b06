"""The cost of each probe relative to a plain step: time, peak memory, bytes between two ranks, in one run.

    python benchmarks/probes.py                                   # all: half an hour on 2 free cores
    python benchmarks/probes.py --tasks 8 --samples shared --rounds 30 --trunk 512x4

Samples are `shared` (each has a label for every task, and each task has a head) or `disjoint` (each belongs
to one task, and all tasks use one head). As in overhead.py, each round takes one step of each variant, in an
order that changes, and the table shows the median over rounds of time / (time of the plain step in that
round). A variant that measures every 10th step is timed over 10 steps. Memory is the peak memory of a process
that runs only one variant, minus its memory before, relative to the plain step. Bytes are what a rank passes
to the collectives of this library in a measured step on 2 ranks. All weights are 1 / norm, so that no solver
is timed. The trunk is an MLP with 13 million parameters. The work of a probe above the features does not
depend on the trunk, so a second table shows the same ratios, with 8 tasks, for trunks and batches of several
sizes. A third table compares side-tuning with tuning the whole trunk. Writes probes.md and probes.json.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import multiprocessing
import os
import random
import resource
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
import torch.nn.functional as F
from problems import Shape
from tables import RESULTS, facts
from torch import Tensor, nn

import mtl_dist.sync.collectives
from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.recipes import SideTuning
from mtl_dist.weighting import Equal, InverseGradNorm

SKETCH = 4096
PROBES: dict[str, Probe] = {
    "FeatureProbe": FeatureProbe(),
    "FeatureTap": FeatureTap(),
    "SharedLayerProbe, exact": SharedLayerProbe(form="exact"),
    "SharedLayerProbe, kernel": SharedLayerProbe(form="kernel"),
    f"SharedLayerProbe, sketch of {SKETCH}": SharedLayerProbe(sketch=SKETCH),
    "ParameterProbe": ParameterProbe(bucket=1 << 19),
    f"ParameterProbe, sketch of {SKETCH}": ParameterProbe(bucket=1 << 19, sketch=SKETCH),
    "ParameterProbe, each 10th step": ParameterProbe(bucket=1 << 19, every=10),
}
PLAIN, AUTOGRAM, BACKWARDS = "plain", "torchjd autogram", "one backward a task"
LAYERS = [PLAIN, "FeatureProbe", *(name for name in PROBES if name.startswith("SharedLayerProbe"))]
SCALES = [((512, 4), 128), ((1024, 5), 128), ((1024, 5), 256), ((1536, 6), 128), ((1536, 6), 256)]
SIDE = [f"{tune}, {how}" for tune in ("full", "side") for how in ("plain sum", "ParameterProbe")]
Step = Callable[[], None]


def variants(samples: str) -> list[str]:
    """The variants. FeatureTap needs one head per task, so it has no disjoint form."""
    named = [name for name in PROBES if samples == "shared" or name != "FeatureTap"]
    return [PLAIN, *named, AUTOGRAM, BACKWARDS]


class Net(nn.Module):
    """An MLP trunk that ends with a linear layer, and linear heads: one per task, or one for all tasks."""

    def __init__(self, shape: Shape, num_tasks: int, samples: str, probe: Probe | None) -> None:
        super().__init__()
        self.samples, self.probe, self.num_tasks = samples, probe, num_tasks
        widths = [shape.features, *[shape.width] * shape.depth]
        layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        self.trunk = nn.Sequential(*layers)
        self.last = nn.Linear(shape.width, shape.features)
        heads = num_tasks if samples == "shared" else 1
        self.heads = nn.ModuleList(nn.Linear(shape.features, 10) for _ in range(heads))
        names = [str(i) for i in range(num_tasks)]
        self.balancer = None if probe is None else Balancer(names, InverseGradNorm(), probe=probe)

    def task_losses(self, z: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        """`[n]`: the losses to weight."""
        if self.samples == "shared":
            return torch.stack([F.cross_entropy(h(z), labels[:, i]) for i, h in enumerate(self.heads)])
        losses = F.cross_entropy(self.heads[0](z), labels[:, 0], reduction="none")
        sums = losses.new_zeros(self.num_tasks).index_add(0, tasks, losses)
        return sums / tasks.bincount(minlength=self.num_tasks).clamp(min=1)

    def forward(self, x: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
        """The scalar to differentiate."""
        if self.balancer is None:
            return self.task_losses(self.last(self.trunk(x)), labels, tasks).sum()
        x = self.trunk(x)
        layer = {"layer": self.last} if isinstance(self.probe, SharedLayerProbe) else {}
        features = x if layer else self.last(x)
        if self.samples == "shared":
            heads = {
                str(i): lambda z, i=i, h=h: F.cross_entropy(h(z), labels[:, i])
                for i, h in enumerate(self.heads)
            }
            return self.balancer(features, heads, **layer)

        def of_samples(z: Tensor) -> Tensor:
            return F.cross_entropy(self.heads[0](z), labels[:, 0], reduction="none")

        return self.balancer(features, of_samples, task_ids=tasks, **layer)


def make_step(name: str, shape: Shape, num_tasks: int, samples: str) -> Step:
    """One training step of a variant, including the optimizer."""
    torch.manual_seed(0)
    net = Net(shape, num_tasks, samples, PROBES.get(name))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    differentiate = {AUTOGRAM: _autogram, BACKWARDS: _backwards}.get(name, lambda net: _plain)(net)

    def step() -> None:
        x = torch.randn(shape.batch, shape.features)
        labels = torch.randint(10, (shape.batch, num_tasks))
        tasks = torch.arange(shape.batch) % num_tasks
        optimizer.zero_grad()
        differentiate(net, x, labels, tasks)
        optimizer.step()

    return step


def _plain(net: Net, x: Tensor, labels: Tensor, tasks: Tensor) -> None:
    net(x, labels, tasks).backward()


def _autogram(net: Net) -> Callable[..., None]:
    """The Gram matrix of all shared parameters by torchjd, then one weighted backward pass."""
    from torchjd.autogram import Engine

    engine = Engine(net.trunk, net.last, batch_dim=None)

    def differentiate(net: Net, x: Tensor, labels: Tensor, tasks: Tensor) -> None:
        losses = net.task_losses(net.last(net.trunk(x)), labels, tasks)
        gram = engine.compute_gramian(losses)
        losses.backward(gram.diagonal().clamp(min=1e-30).rsqrt())

    return differentiate


def _backwards(net: Net) -> Callable[..., None]:
    """One full gradient per task, all in memory; their Gram matrix; then one weighted backward pass."""
    shared = [*net.trunk.parameters(), *net.last.parameters()]

    def differentiate(net: Net, x: Tensor, labels: Tensor, tasks: Tensor) -> None:
        losses = net.task_losses(net.last(net.trunk(x)), labels, tasks)
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(loss, shared, retain_graph=True)])
                for loss in losses
            ]
        )
        gram = rows @ rows.T
        losses.backward(gram.diagonal().clamp(min=1e-30).rsqrt())

    return differentiate


def make_side_step(name: str, channels: int = 32, features: int = 256) -> Step:
    """One step of side-tuning or of tuning the whole trunk, which is much larger than the side network."""
    tune, how = name.split(", ")
    recipe = SideTuning(
        num_train=128, tune=tune, channels=channels, features=features, side_channels=4, pretrain_steps=0
    )
    torch.manual_seed(0)
    probe = ParameterProbe(bucket=1 << 19) if how == "ParameterProbe" else None
    balancer = Balancer(recipe.tasks, InverseGradNorm() if probe else Equal(), probe=probe)
    net = recipe.model(balancer)
    samples = recipe.data(0)[0].__getitems__(range(128))
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        net(**samples).backward()
        optimizer.step()

    return step


def shape_of(arguments: argparse.Namespace) -> Shape:
    width, depth = arguments.trunk
    return Shape(batch=arguments.batch, width=width, depth=depth)


def parsed_trunk(text: str) -> tuple[int, int]:
    """Parses a trunk: `1024x5` is five layers with 1024 units, before the last linear layer."""
    width, _, depth = text.partition("x")
    if not (width.isdigit() and depth.isdigit()):
        raise argparse.ArgumentTypeError(f"must be WIDTHxDEPTH, as 1024x5; got {text!r}")
    return int(width), int(depth)


# ---- measuring -----------------------------------------------------------------------------------


def times(make: Callable[[str], Step], names: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step of every variant, round by round."""
    steps = {name: make(name) for name in names}
    repeats = {name: PROBES[name].every if name in PROBES else 1 for name in names}
    order, taken = random.Random(0), {name: [] for name in names}
    for number in range(rounds + 1):
        for name in order.sample(names, len(names)):
            start = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            if number:
                taken[name].append(1e3 * (time.perf_counter() - start) / repeats[name])
    return taken


def peaks(make: Callable[[str], Step], tiny: Callable[[str], Step], names: list[str]) -> dict[str, float]:
    """Peak memory in MB of three steps of each variant, in its own process.

    A `tiny` step comes first, so that imports and one-time initialisation do not count.
    """
    found = {}
    for name in names:
        queue: Any = multiprocessing.get_context("fork").SimpleQueue()
        process = multiprocessing.get_context("fork").Process(target=_peak, args=(make, tiny, name, queue))
        process.start()
        found[name] = queue.get()
        process.join()
    return found


def _peak(make: Callable[[str], Step], tiny: Callable[[str], Step], name: str, queue: Any) -> None:
    tiny(name)()
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = make(name)
    for _ in range(3):
        step()
    queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def bytes_sent(shape: Shape, num_tasks: int, samples: str) -> dict[str, int]:
    """Bytes that this rank passes to the library's collectives in a measured step."""
    counted = 0

    def counting(original: Callable, position: int) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal counted
            counted += args[position].numel() * args[position].element_size()
            return original(*args, **kwargs)

        return call

    originals = dist.all_reduce, dist.all_gather, mtl_dist.sync.collectives._reduce_scatter
    found = {}
    for name in (name for name in variants(samples) if name in PROBES):
        step = make_step(name, shape, num_tasks, samples)
        if PROBES[name].every == 1:
            step()  # in the first step ranks also compare their settings
        dist.all_reduce, dist.all_gather = counting(originals[0], 0), counting(originals[1], 1)
        mtl_dist.sync.collectives._reduce_scatter = counting(originals[2], 1)
        counted = 0
        step()
        dist.all_reduce, dist.all_gather, mtl_dist.sync.collectives._reduce_scatter = originals
        found[name] = counted
    return found


def worker(arguments: argparse.Namespace) -> dict[str, Any]:
    """One kind of samples and number of tasks, or the side-tuning table."""
    torch.set_num_threads(1)
    shape, tiny = shape_of(arguments), Shape(batch=64, width=4, depth=1, features=4)
    samples, n = arguments.samples[0], arguments.tasks[0]
    if arguments.worker == "bytes":
        dist.init_process_group("gloo")
        result = bytes_sent(shape, n, samples)
        rank = dist.get_rank()
        dist.barrier()
        gc.collect()
        dist.destroy_process_group()
        return result if rank == 0 else {}
    if arguments.worker == "side":
        memory = peaks(make_side_step, partial(make_side_step, channels=1, features=4), SIDE)
        return {"milliseconds": times(make_side_step, SIDE, arguments.rounds), "memory": memory}
    make = partial(make_step, shape=shape, num_tasks=n, samples=samples)
    names = LAYERS if arguments.worker == "layers" else variants(samples)
    if arguments.worker == "memory":
        return {"memory": peaks(make, partial(make_step, shape=tiny, num_tasks=n, samples=samples), names)}
    return {"milliseconds": times(make, names, arguments.rounds)}


# ---- the command ---------------------------------------------------------------------------------


def launch(
    arguments: argparse.Namespace, kind: str, samples: str = "shared", tasks: int = 8
) -> dict[str, Any]:
    """Measures in a new process (in two processes for bytes)."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(launcher if kind == "bytes" else []), __file__, "--worker", kind]
    command += ["--samples", samples, "--tasks", str(tasks), "--batch", str(arguments.batch)]
    command += ["--trunk", "x".join(map(str, arguments.trunk))]
    command += ["--rounds", str(arguments.rounds)]
    # freed blocks return to the system at once, so that resident memory follows the used memory
    trimmed = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(trimmed if kind in ("memory", "side") else {})}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT {"):
            return json.loads(line.removeprefix("RESULT "))
    raise SystemExit(done.stdout + done.stderr)


def ratios(taken: dict[str, list[float]], base: str) -> dict[str, float]:
    """Median over rounds of the time of each variant / (time of the base in the same round)."""
    return {
        name: statistics.median(a / b for a, b in zip(values, taken[base], strict=True))
        for name, values in taken.items()
    }


def table(results: dict[str, Any]) -> str:
    parts = [
        "Ratios to the plain step of the same round. "
        + ", ".join(f"{k} {v}" for k, v in results["facts"].items()),
        *(_probe_table(samples, cells) for samples, cells in results["probes"].items()),
        *(_scale_table(samples, cells) for samples, cells in results["scales"].items()),
        _side_table(results["side"]),
    ]
    return "\n\n".join(parts) + "\n"


def _probe_table(samples: str, by_count: dict[str, Any]) -> str:
    lines = ["| variant | " + " | ".join(f"time, n={n} | memory | kB reduced" for n in by_count) + " |"]
    lines.append("|---|" + "---:|---:|---:|" * len(by_count))
    for name in variants(samples):
        cells = []
        for cell in by_count.values():
            sent = cell["bytes"].get(name)
            reduced = "" if sent is None else f"{sent / 1e3:.1f}"
            cells.append(f"{cell['time'][name]:.2f} | {cell['memory'][name]:.2f} | {reduced}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    plain = ", ".join(f"{cell['plain_ms']:.1f} ms (n={n})" for n, cell in by_count.items())
    return f"## {samples.capitalize()} samples\n\n" + "\n".join(lines) + f"\n\nPlain step: {plain}."


def _scale_table(samples: str, by_size: dict[str, Any]) -> str:
    lines = ["| variant | " + " | ".join(by_size) + " |", "|---|" + "---:|" * len(by_size)]
    for name in LAYERS:
        cells = " | ".join(f"{cell['time'][name]:.3f}" for cell in by_size.values())
        lines.append(f"| {name} | {cells} |")
    plain = ", ".join(f"{cell['plain_ms']:.1f} ms" for cell in by_size.values())
    title = f"## {samples.capitalize()} samples, 8 tasks, shared parameters and batches of several sizes"
    return f"{title}\n\n" + "\n".join(lines) + f"\n\nPlain step: {plain}."


def _side_table(side: dict[str, Any]) -> str:
    lines = ["## Side-tuning, 4 tasks, beside tuning the whole trunk", ""]
    lines += ["| variant | time | memory, MB |", "|---|---:|---:|"]
    lines += [f"| {name} | {side['time'][name]:.2f} | {side['memory'][name]:.1f} |" for name in SIDE]
    return "\n".join(lines)


def about(arguments: argparse.Namespace) -> dict[str, Any]:
    """Facts about the machine and the problem."""
    shape = shape_of(arguments)
    net = Net(shape, 2, "shared", None)
    shared = sum(p.numel() for module in (net.trunk, net.last) for p in module.parameters())
    return {
        **facts(),
        "rounds": arguments.rounds,
        "batch_per_rank": shape.batch,
        "shared_parameters": shared,
        "sketch": SKETCH,
    }


def measured(arguments: argparse.Namespace, samples: str, tasks: int) -> dict[str, Any]:
    found = launch(arguments, "time", samples, tasks)
    memory = launch(arguments, "memory", samples, tasks)["memory"]
    return {
        "plain_ms": statistics.median(found["milliseconds"][PLAIN]),
        "time": ratios(found["milliseconds"], PLAIN),
        "memory": {name: peak / memory[PLAIN] for name, peak in memory.items()},
        "memory_mb": memory,
        "bytes": launch(arguments, "bytes", samples, tasks),
        **found,
    }


def scaled(arguments: argparse.Namespace, samples: str) -> dict[str, Any]:
    """The probes at the features and at the last layer, 8 tasks, for trunks and batches of several sizes."""
    found = {}
    for trunk, batch in SCALES:
        sized = argparse.Namespace(**{**vars(arguments), "trunk": trunk, "batch": batch})
        taken = launch(sized, "layers", samples)["milliseconds"]
        size = about(sized)["shared_parameters"] / 1e6
        found[f"{size:.1f} million, batch {batch}"] = {
            "plain_ms": statistics.median(taken[PLAIN]),
            "time": ratios(taken, PLAIN),
            "milliseconds": taken,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--samples", nargs="+", default=["shared", "disjoint"], choices=["shared", "disjoint"]
    )
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--batch", type=int, default=128, help="samples a rank")
    parser.add_argument("--trunk", type=parsed_trunk, default=(1536, 6), metavar="WIDTHxDEPTH")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--worker", choices=["time", "memory", "bytes", "layers", "side"], help=argparse.SUPPRESS
    )
    arguments = parser.parse_args()
    if arguments.worker:
        result = worker(arguments)
        if result:
            print("RESULT " + json.dumps(result))
        return
    side = launch(arguments, "side")
    results: dict[str, Any] = {
        "facts": about(arguments),
        "probes": {
            samples: {str(n): measured(arguments, samples, n) for n in arguments.tasks}
            for samples in arguments.samples
        },
        "scales": {samples: scaled(arguments, samples) for samples in arguments.samples},
        "side": {"time": ratios(side["milliseconds"], SIDE[0]), **side},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "probes.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "probes.md").write_text(table(results), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

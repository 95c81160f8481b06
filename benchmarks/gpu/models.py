"""Part `models`: what a balanced step costs on transformers of 10 million to a billion parameters.

All variants share one model, whose balancer is exchanged, so that a billion parameters are there once. In
each round every variant takes one step, and then `STEPS` more without a pause, as training loops do: these
count. The order changes from round to round. "time" is the median over rounds of its time over that of the
plain step in the same round. What costs several times a step takes part in every third round. With several
GPUs the model is under DDP.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.counting import PeakMemory, counting
from benchmarks.gpu.machine import milliseconds, wait
from benchmarks.gpu.record import CannotRun, Found, Record
from benchmarks.tables import median_and_error
from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.weighting import MGDA, GeometricMean, InverseGradNorm, Rule

TASKS = tuple(f"task{i}" for i in range(8))
CLASSES = 16
PLAIN, TORCHJD, BACKWARDS = "plain", "torchjd mtl_backward, MGDA", "one backward a task"
SLOW = (TORCHJD, BACKWARDS, "ParameterProbe, MGDA")
STEPS = 4
BYTES_A_PARAMETER = 24  # parameters, gradients, their copies in bf16 and of a bucket, activations


@dataclass(frozen=True)
class Size:
    """A transformer, and batches that keep a large GPU busy. A layer has about 12 width² parameters."""

    width: int
    depth: int
    heads: int
    samples: int
    length: int
    rounds: int

    @property
    def parameters(self) -> int:
        """Of its layers, about."""
        return 12 * self.width**2 * self.depth


SIZES = {
    "10M": Size(384, 6, 6, 512, 256, rounds=4),
    "100M": Size(768, 14, 12, 128, 256, rounds=4),
    "1B": Size(2048, 20, 16, 32, 256, rounds=3),
    "2.4B": Size(2560, 30, 20, 16, 256, rounds=3),
}
TINY = {"tiny": Size(32, 1, 2, 4, 8, rounds=2)}

Balanced = tuple[Rule, Probe | None, dict[str, Any]]
EQUAL = {"lag": 1, "counts": "equal"}
VARIANTS: dict[str, Callable[[], Balanced] | None] = {
    PLAIN: None,
    "plain, again": None,
    "losses only, GeometricMean": lambda: (GeometricMean(), None, {}),
    "FeatureProbe, InverseGradNorm": lambda: (InverseGradNorm(), FeatureProbe(), {}),
    "FeatureProbe, MGDA": lambda: (MGDA(), FeatureProbe(), {}),
    "FeatureTap, MGDA": lambda: (MGDA(), FeatureTap(), {}),
    "SharedLayerProbe, MGDA": lambda: (MGDA(), SharedLayerProbe(), {}),
    "ParameterProbe, MGDA": lambda: (MGDA(), ParameterProbe(), {}),
    "lag=1, losses only, GeometricMean": lambda: (GeometricMean(), None, EQUAL),
    "lag=1, InverseGradNorm": lambda: (InverseGradNorm(), None, EQUAL),
    "lag=1, MGDA": lambda: (MGDA(), None, EQUAL),
    TORCHJD: None,
    BACKWARDS: None,
}


class Transformer(nn.Module):
    """A trunk of transformer layers, a last layer, and one small head per task on the mean over tokens.

    Attributes:
        balancer: exchanged from variant to variant.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(size.width, size.heads, 4 * size.width, **options)
        self.trunk = nn.TransformerEncoder(layer, size.depth, enable_nested_tensor=False)
        self.last = nn.Linear(size.width, size.width)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(size.width, size.width), nn.GELU(), nn.Linear(size.width, CLASSES))
            for _ in TASKS
        )
        self.balancer: Balancer | None = None
        self.losses_only = False

    def loss(self, task: str, z: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of one task."""
        i = TASKS.index(task)
        return F.cross_entropy(self.heads[i](z).float(), labels[:, i])

    def losses(self, z: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Of all tasks."""
        return {task: self.loss(task, z, labels) for task in TASKS}

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        """The scalar to differentiate."""
        hidden = self.trunk(x).mean(1)
        if self.balancer is None:
            return torch.stack(list(self.losses(self.last(hidden), labels).values())).sum()
        if self.losses_only:
            return self.balancer(self.losses(self.last(hidden), labels))
        heads = {task: partial(self._at, task, labels) for task in TASKS}
        if isinstance(self.balancer.probe, SharedLayerProbe):
            return self.balancer(hidden, heads, layer=self.last)
        return self.balancer(self.last(hidden), heads)

    def _at(self, task: str, labels: Tensor, z: Tensor) -> Tensor:
        return self.loss(task, z, labels)


class Bench:
    """One model on this rank's device, and the steps of all variants on it.

    Raises:
        CannotRun: the device has too little free memory.
    """

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            if free < (needed := BYTES_A_PARAMETER * size.parameters):
                raise CannotRun(
                    f"{free / 1e9:.0f} GB are free on the GPU, about {needed / 1e9:.0f} are needed"
                )
        torch.manual_seed(0)
        with torch.device(device):
            self.net = Transformer(size)
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.model = DistributedDataParallel(self.net) if self.world_size > 1 else self.net
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=1e-6)  # the model stays what it is
        self.batches = [self._batch() for _ in range(2)]

    def _batch(self) -> tuple[Tensor, Tensor]:
        x = torch.randn(self.size.samples, self.size.length, self.size.width, device=self.device)
        return x, torch.randint(CLASSES, (self.size.samples, len(TASKS)), device=self.device)

    def step(self, name: str, balancer: Balancer | None, losses_only: bool, number: int) -> None:
        """One training step of a variant in bf16."""
        self.net.balancer, self.net.losses_only = balancer, losses_only
        self.optimizer.zero_grad()
        x, labels = self.batches[number % 2]
        with torch.autocast(self.device.type, torch.bfloat16):
            if name in (TORCHJD, BACKWARDS):
                z = self.net.last(self.net.trunk(x).mean(1))
                losses = list(self.net.losses(z, labels).values())
            else:
                total = self.model(x, labels)
        if name == TORCHJD:
            self._torchjd(z, losses)
        elif name == BACKWARDS:
            for i, loss in enumerate(losses, 1):
                loss.backward(retain_graph=i < len(losses))
        else:
            total.backward()
        self.optimizer.step()

    def _torchjd(self, z: Tensor, losses: list[Tensor]) -> None:
        from torchjd import aggregation, autojac

        autojac.mtl_backward(losses, z)
        autojac.jac_to_grad([*self.net.trunk.parameters(), *self.net.last.parameters()], aggregation.MGDA())

    def stepper(self, name: str) -> Callable[[int], None]:
        """The steps of a variant, after two of them.

        Raises:
            CannotRun: TorchJD is not installed, or ranks would not average its gradients.
        """
        if name in (TORCHJD, BACKWARDS) and self.world_size > 1:
            raise CannotRun("several backward passes do not go through DDP")
        if name == TORCHJD:
            try:
                import torchjd  # noqa: F401
            except ImportError as error:
                raise CannotRun("torchjd is not installed") from error
        made = VARIANTS[name]
        rule, probe, settings = made() if made is not None else (None, None, {})
        losses_only = rule is not None and isinstance(rule, GeometricMean)
        balancer = None if rule is None else Balancer(TASKS, rule, probe=probe, **settings)
        step = partial(self.step, name, balancer, losses_only)
        for number in range(2):
            step(number)
        wait(self.device)
        return step


def measure(size: Size, device: torch.device, variants: list[str], until: float) -> dict[str, Found]:
    """Time, memory, operators and host reads of every variant of one model.

    Args:
        size: of the model.
        device: of this rank.
        variants: their names, the plain step first.
        until: when no further round is begun, but for the first two.

    Raises:
        CannotRun: the device has too little memory, even for the plain step.
    """
    bench = Bench(size, device)
    steps: dict[str, Callable[[int], None]] = {}
    found: dict[str, Found] = {}
    for name in variants:
        try:
            bench.optimizer.zero_grad()  # or the gradients of the variant before would be there already
            with PeakMemory() as memory:
                steps[name] = bench.stepper(name)
            found[name] = {"outcome": "passed", "memory_mb": round(memory.megabytes, 1)}
        except (CannotRun, torch.OutOfMemoryError) as error:
            reason = str(error) if isinstance(error, CannotRun) else "out of memory"
            found[name] = {"outcome": "skipped", "reason": reason}
            bench.optimizer.zero_grad()
            gc.collect()
            if name == PLAIN:
                raise CannotRun(f"the plain step: {reason}") from error
    order = random.Random(0)
    times: dict[str, dict[int, float]] = {name: {} for name in steps}
    for number in range(size.rounds):
        if number >= 2 and _anyone(time.monotonic() > until, device):
            break
        for name in order.sample(list(steps), len(steps)):
            if name in SLOW and number % 3:
                continue
            if dist.is_initialized():
                dist.barrier()
            steps[name](0)
            several = 1 if name in SLOW else STEPS
            milli = milliseconds(device, partial(_several, steps[name], several)) / several
            times[name][number] = milli
    for name, step in steps.items():
        with counting() as counts:
            step(0)
        found[name] |= summary(times[name], times[PLAIN])
        found[name] |= {
            "operators": counts.operators,
            "reads": counts.reads,
            "collectives": counts.collectives,
        }
    return found


def _anyone(late: bool, device: torch.device) -> bool:
    """Whether it is so on any rank."""
    if not dist.is_initialized():
        return late
    flag = torch.tensor(float(late), device=device)
    dist.all_reduce(flag)
    return bool(flag)


def _several(step: Callable[[int], None], number: int) -> None:
    for i in range(1, number + 1):
        step(i)


def summary(mine: dict[int, float], plain: dict[int, float]) -> Found:
    """Milliseconds, and the ratio paired by rounds with half of its 95 % interval."""
    ratio, error = median_and_error([milli / plain[number] for number, milli in mine.items()])
    milli, _ = median_and_error(list(mine.values()))
    error_known = round(error, 4) if len(mine) > 1 else None
    return {"ms": round(milli, 3), "ratio": round(ratio, 4), "ratio_error": error_known}


def parts(*, brief: bool) -> Iterator[tuple[str, Size]]:
    """The models to measure."""
    yield from (TINY if brief else SIZES).items()


def run(record: Record, device: torch.device, *, brief: bool = False) -> None:
    """All models, from small to large; a model is one result for each variant."""
    for name, size in parts(brief=brief):

        def one(size: Size = size) -> Found:
            found = measure(size, device, list(VARIANTS), record.until)
            return {"parameters": size.parameters, "variants": found}

        record.run(name, one)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

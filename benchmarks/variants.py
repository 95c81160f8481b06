"""The variants of overhead.py: how a step weighs its losses."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engines import LEARNING_RATE, Step, engine_step
from problems import PROBLEMS, Problem
from torch import Tensor

from mtl_dist import Balancer, FeatureProbe, FeatureTap, SharedLayerProbe
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


@dataclass(frozen=True)
class Balanced:
    """The arguments of a balancer, and whether its report is logged."""

    rule: Rule
    probe: Probe | None = None
    options: dict[str, Any] = field(default_factory=dict)
    logged: bool = False

    @property
    def missing(self) -> list[str]:
        """The options that the installed `Balancer` does not have."""
        return [name for name in self.options if name not in inspect.signature(Balancer).parameters]

    def balancer(self, tasks: int) -> Balancer:
        """A new balancer for tasks 0 to n - 1."""
        return Balancer([str(i) for i in range(tasks)], self.rule, probe=self.probe, **self.options)


LAG = {"lag": 1, "counts": "equal"}
BALANCED: dict[str, Balanced] = {
    "losses only, InverseLoss": Balanced(InverseLoss()),
    "FeatureProbe, MGDA": Balanced(MGDA(), FeatureProbe()),
    "FeatureTap, MGDA": Balanced(MGDA(), FeatureTap()),
    "SharedLayerProbe, MGDA": Balanced(MGDA(), SharedLayerProbe()),
    "lag=1, losses only, InverseLoss": Balanced(InverseLoss(), options=LAG),
    "lag=1, InverseGradNorm": Balanced(InverseGradNorm(), options=LAG),
    "lag=1, MGDA": Balanced(MGDA(), options=LAG),
    "lag=1, MGDA, counts given": Balanced(MGDA(), options={"lag": 1}),
}
MORE: dict[str, Balanced] = {
    "losses only, GeometricMean": Balanced(GeometricMean()),
    "losses only, Uncertainty": Balanced(Uncertainty()),
    "losses only, FAMO": Balanced(FAMO()),
    "losses only, RLW": Balanced(RLW()),
    "FeatureTap, InverseGradNorm": Balanced(InverseGradNorm(), FeatureTap()),
    "FeatureProbe, MGDA, logged": Balanced(MGDA(), FeatureProbe(), logged=True),
    "FeatureProbe, InverseGradNorm": Balanced(InverseGradNorm(), FeatureProbe()),
    "FeatureProbe, UPGrad": Balanced(UPGrad(), FeatureProbe()),
    "FeatureProbe, Every(10, MGDA)": Balanced(Every(MGDA(), 10), FeatureProbe()),
    "FeatureProbe(reevaluate), MGDA": Balanced(MGDA(), FeatureProbe(reevaluate=True)),
}
PLAIN = "plain"
AGAIN = "plain, again"  # shows the noise
MEETING = "plain, and the ranks meet"
TORCHJD = "torchjd mtl_backward, MGDA"
BACKWARDS = "one backward a task"
BARE = (TORCHJD, BACKWARDS)  # no engine takes them
VARIANTS = (PLAIN, AGAIN, MEETING, *BALANCED, *BARE)  # what runs unless others are named
ALL = (*VARIANTS, *MORE)


def left_out(name: str, engine: str, ranks: int) -> str | None:
    """Why a variant does not run; None if it does."""
    variant = (BALANCED | MORE).get(name)
    if variant is not None and variant.missing:
        return f"this Balancer has no argument {variant.missing[0]!r}"
    if name == TORCHJD and importlib.util.find_spec("torchjd") is None:
        return "torchjd is not installed"
    if name in BARE and engine not in ("plain", "ddp"):
        return f"{engine} takes one backward"
    if name == MEETING and ranks == 1:
        return "one rank has nobody to meet"
    return None


def make_step(
    name: str, heads: str, tasks: int, batch: int | None, device: torch.device, engine: str
) -> tuple[Step, Problem]:
    """One training step of a variant, including the optimizer, and its network."""
    torch.manual_seed(0)
    net = PROBLEMS[heads](tasks, batch).to(device)
    net.meets = name == MEETING
    if name in BARE:
        return _bare(net, _torchjd(net) if name == TORCHJD else _one_backward_a_task), net
    variant = (BALANCED | MORE).get(name)
    if variant is not None:
        net.balancer = variant.balancer(net.tasks)
    step = engine_step(engine, net, net.balancer)
    return (_logged(step, net.balancer) if variant is not None and variant.logged else step), net


def _logged(step: Step, balancer: Any) -> Step:
    """The step and its row; rank 0 writes the row to a file, as the training program does."""
    trackers = [JsonlTracker()] if not dist.is_initialized() or dist.get_rank() == 0 else []
    log = RunLog(trackers, RunInfo(Path(tempfile.mkdtemp()), balancer.tasks, {})).__enter__()
    numbers = itertools.count(1)

    def logged(x: Tensor, y: Tensor) -> None:
        step(x, y)
        start = time.perf_counter()
        log.add(balancer.report)
        log.step(next(numbers), {"perf/step_ms": 1.0})
        LOGGING.append(1e3 * (time.perf_counter() - start))

    return logged


def _bare(net: Problem, backward: Callable[[Tensor, list[Tensor]], None]) -> Step:
    """A step without an engine; one all-reduce averages the gradients over ranks."""
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        z = net.last(net.trunk(x))
        backward(z, net.losses(z, y))
        if dist.is_initialized():
            grads = [p.grad for p in net.parameters() if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, piece in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(piece.view_as(grad))
        optimizer.step()

    return step


def _torchjd(net: Problem) -> Callable[[Tensor, list[Tensor]], None]:
    from torchjd import aggregation, autojac

    aggregator = aggregation.MGDA()
    shared = [*net.trunk.parameters(), *net.last.parameters()]
    one_head = len(net.heads) < net.tasks  # whose graph all losses share

    def backward(z: Tensor, losses: list[Tensor]) -> None:
        autojac.mtl_backward(losses, z, retain_graph=one_head)
        autojac.jac_to_grad(shared, aggregator)

    return backward


def _one_backward_a_task(z: Tensor, losses: list[Tensor]) -> None:
    for loss in losses[:-1]:
        loss.backward(retain_graph=True)
    losses[-1].backward()

"""Trains a small model for a few steps on the real engine, and for comparison on one plain process."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mtl_dist.balancer import Balancer
from mtl_dist.integrations.accelerate import attach
from mtl_dist.stats import LocalStats
from mtl_dist.sync import Identity, Synchronizer
from mtl_dist.virtual import VirtualRanks
from mtl_dist.weighting import MGDA

TASKS = ("a", "b", "c")
STEPS = 6
PER_RANK = 8  # samples
TOLERANCE = {
    "no": 1e-5,
    "bf16": 5e-2,
    "fp16": 2e-2,
    "fp8": 1e-1,
}  # relative to the largest weight, by precision
_REDUCTIONS = 60


@dataclass(frozen=True)
class Trial:
    """The result of the comparison.

    Attributes:
        error: largest difference of a weight at any step, relative to the largest weight.
        tolerance: the error that the precision of the engine explains.
        agree: whether all ranks have bitwise the same weights.
    """

    error: float
    tolerance: float
    agree: bool


class _Net(nn.Module):
    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh())
        self.heads = nn.ModuleList([nn.Linear(8, 2) for _ in TASKS])

    def forward(self, inputs: Tensor) -> Tensor:
        """The balancer's scalar: each head predicts two of the inputs."""

        def losses(z: Tensor) -> dict[str, Tensor]:
            outputs = [head(z) for head in self.heads]
            # small losses: gradient clipping at a norm of 1, which many configurations use, must not act
            return {
                task: 0.02 * (i + 1) * (out.float() - inputs[:, 2 * i : 2 * i + 2]).square().mean()
                for i, (task, out) in enumerate(zip(TASKS, outputs, strict=True))
            }

        total: Tensor = self.balancer(self.trunk(inputs), losses)
        return total


def run_trial(accelerator: Accelerator) -> Trial:
    """Trains on the engine, and on every rank also alone on the concatenated batches."""
    size = accelerator.num_processes
    got = _train(accelerator, size).cpu()
    expected = _train_alone(size)
    error = float((got - expected).abs().max() / expected.abs().max())
    synchronizer = Synchronizer(len(TASKS))
    synchronizer.connect(lambda: Identity({"doctor": "agreement"}, ""))
    everyone = synchronizer.gather_rows(got.to(accelerator.device)[None])
    agree = all(torch.equal(everyone[0], other) for other in everyone)
    return Trial(error, TOLERANCE.get(accelerator.mixed_precision, 5e-2), agree)


def time_all_reduce(accelerator: Accelerator) -> tuple[float, float]:
    """Median and 95th percentile of the time to reduce one step's statistics of 8 tasks, in milliseconds."""
    synchronizer = Synchronizer(8)
    synchronizer.connect(lambda: Identity({"doctor": "times"}, ""))
    stats = LocalStats.zeros(8, accelerator.device)
    times = []
    for _ in range(_REDUCTIONS):
        start = time.perf_counter()
        synchronizer.reduce(stats).total.counts.cpu()  # waits for the device
        times.append(1e3 * (time.perf_counter() - start))
    ordered = sorted(times[_REDUCTIONS // 6 :])  # without the first ones, which connect the ranks
    return ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]


def _train(accelerator: Accelerator, size: int) -> Tensor:
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = PER_RANK
    net, optimizer = _build()
    model, prepared = accelerator.prepare(net, optimizer)
    balancer = attach(net.balancer, accelerator)
    rank, rows = accelerator.process_index, []
    for step in range(STEPS):
        inputs = _batch(step, size)[rank * PER_RANK : (rank + 1) * PER_RANK].to(accelerator.device)
        inputs = inputs.to(next(model.parameters()).dtype)
        accelerator.backward(model(inputs))
        prepared.step()
        prepared.zero_grad()
        rows.append(_weights(balancer))
    return torch.stack(rows)


def _train_alone(size: int) -> Tensor:
    net, optimizer = _build()
    alone = VirtualRanks(1, net.balancer, net)  # this process communicates with no other
    rows = []
    for step in range(STEPS):
        inputs = _batch(step, size)
        optimizer.zero_grad()
        alone.run(partial(_forward_backward, net, inputs))
        optimizer.step()
        rows.append(_weights(net.balancer))
    return torch.stack(rows)


def _forward_backward(net: _Net, inputs: Tensor, _: int) -> Tensor:
    total: Tensor = net(inputs)
    total.backward()  # type: ignore[no-untyped-call]
    return total


def _build() -> tuple[_Net, torch.optim.Optimizer]:
    state = torch.get_rng_state()
    torch.manual_seed(5)
    net = _Net(Balancer(TASKS, MGDA()))
    torch.set_rng_state(state)
    return net, torch.optim.SGD(net.parameters(), lr=0.5)


def _batch(step: int, size: int) -> Tensor:
    """`[size * PER_RANK, 6]`, the concatenated batch of a step."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(size * PER_RANK, 6, generator=generator)


def _weights(balancer: Balancer) -> Tensor:
    report = balancer.report
    assert report is not None
    return report.weight_vector.detach().double()

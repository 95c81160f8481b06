"""A few accumulated steps under Accelerate, saved and resumed; started by test_accelerate.py.

    accelerate_run.py OUT ENGINE PROBE...

Each rank writes `OUT.RANK`: by probe, what it ran on, and weights of every step, resumed or not. The model
has two balancers, attached under two names.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, set_seed
from torch import Tensor, nn

from mtl_dist import Balancer, FeatureProbe, FeatureTap
from mtl_dist.integrations.accelerate import attach
from mtl_dist.weighting import MGDA, InitialLoss, Smooth

PROBES = {"FeatureProbe": FeatureProbe, "FeatureTap": FeatureTap}
TASKS = ("a", "b", "c")
WINDOW = 2


class Net(nn.Module):
    """Three tasks weighted by gradients; the squared sizes of two features by losses alone."""

    def __init__(self, probe: str) -> None:
        super().__init__()
        self.balancer = Balancer(TASKS, Smooth(MGDA(), 0.5), probe=PROBES[probe]())
        self.sizes = Balancer(("even", "odd"), Smooth(InitialLoss(), 0.7))
        self.trunk = nn.Linear(4, 6)
        self.heads = nn.ModuleDict({task: nn.Linear(6, 1) for task in TASKS})

    def forward(self, x: Tensor) -> Tensor:
        z = self.trunk(x).tanh()
        heads = {t: (lambda z, t=t: (self.heads[t](z) - 1).square().mean()) for t in TASKS}
        squares = z.square() + 0.1
        return self.balancer(z, heads) + self.sizes(
            {"even": squares[:, ::2].mean(), "odd": squares[:, 1::2].mean()}
        )


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def make_accelerator(engine: str) -> Accelerator:
    if engine.startswith("zero"):
        # gradient_clipping: 0 would become 1
        plugin = DeepSpeedPlugin(
            zero_stage=int(engine[-1]), gradient_accumulation_steps=WINDOW, gradient_clipping=1e6
        )
        plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 5
        return Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    if engine == "fsdp2":
        # Accelerate knows FSDP on accelerators only
        PartialState(cpu=True)
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "_cpu": False}
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="NO_WRAP"
        )
        return Accelerator(fsdp_plugin=plugin, gradient_accumulation_steps=WINDOW)
    return Accelerator(gradient_accumulation_steps=WINDOW)


def build(probe: str, accelerator: Accelerator) -> tuple[nn.Module, object, Net]:
    set_seed(0)
    net = Net(probe)
    attach(net.balancer, accelerator)
    attach(net.sizes, accelerator, name="sizes")
    return *accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1)), net


def run(model: nn.Module, net: Net, optimizer: object, accelerator: Accelerator, steps: range) -> list:
    rows = []
    for step in steps:
        with accelerator.accumulate(model):
            accelerator.backward(model(batch(step, accelerator.process_index)))
            report, sizes = net.balancer.report, net.sizes.report
            rows.append([report.weights, report.grad_norms, report.losses, sizes.weights, sizes.losses])
            optimizer.step()
            optimizer.zero_grad()
    return rows


def refusal(net: Net, accelerator: Accelerator, folder: str) -> str:
    """What is said where the second balancer's checkpoint is missing."""
    if accelerator.is_main_process:
        (Path(folder) / "sizes.json").unlink()
    accelerator.wait_for_everyone()
    try:
        accelerator.load_state(folder)
    except FileNotFoundError as error:
        return str(error)
    return "loaded"


def train(out: str, engine: str, probe: str) -> dict:
    accelerator = make_accelerator(engine)
    model, optimizer, net = build(probe, accelerator)
    rows = run(model, net, optimizer, accelerator, range(4))
    folder = f"{out}.{probe}"
    accelerator.save_state(folder)
    accelerator.wait_for_everyone()
    rows += run(model, net, optimizer, accelerator, range(4, 8))
    accelerator.load_state(folder)
    report = net.balancer.report.weights
    resumed = run(model, net, optimizer, accelerator, range(4, 8))
    facts = {
        "world_size": accelerator.num_processes,
        "type": accelerator.distributed_type.value,
        "model": type(model).__name__,
        "zero": model.zero_optimization_stage() if engine.startswith("zero") else None,
        "step": net.balancer.step,
        "rows": rows,
        "report": report,
        "resumed": resumed,
        "refusal": refusal(net, accelerator, folder),
    }
    accelerator.free_memory()
    return facts


def main() -> None:
    out, engine, *probes = sys.argv[1:]
    torch.set_num_threads(1)
    facts = {probe: train(out, engine, probe) for probe in probes}
    state = PartialState()
    Path(f"{out}.{state.process_index}").write_text(json.dumps(facts))
    gc.collect()  # a DDP model that outlives its Gloo group can hang at exit (torch 2.13)
    state.destroy_process_group()


if __name__ == "__main__":
    main()

"""ParameterProbe under every engine; compares with explicit autograd on the whole batch in each process.

    parameter_engines.py FAMILY

FAMILY is `torch` (DDP and FSDP2), `few` of them, or `deepspeed` (ZeRO 0-3). Prints one line a cell: its
name, the error of the Gram relative to the products of norms, and that of the parameters after the steps.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from ranks import start, stop
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mtl_dist import Balancer, ParameterProbe
from mtl_dist.weighting import MGDA

TASKS = ("a", "b", "c")
BATCH, STEPS, WIDTH = 24, 3, 10


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.inner(self.norm(x)).tanh(), 0.0)


class Net(nn.Module):
    """Residual trunk, three heads; `lazy`: the features are a function; `given`: losses and `parameters=`."""

    def __init__(
        self, balancer: Balancer, *, lazy: bool = False, given: bool = False, checkpointed: bool = False
    ) -> None:
        super().__init__()
        self.balancer, self.lazy, self.given, self.checkpointed = balancer, lazy, given, checkpointed
        self.trunk = nn.Sequential(nn.Linear(6, WIDTH), Block(), Block())
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 1) for _ in TASKS)

    def features(self, x: Tensor) -> Tensor:
        return checkpoint(self.trunk, x, use_reentrant=False) if self.checkpointed else self.trunk(x)

    def losses(self, y: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
        def loss(i: int, z: Tensor) -> Tensor:
            return (0.1 + i) * F.mse_loss(self.heads[i](z).squeeze(-1), y[:, i])

        return {task: (lambda z, i=i: loss(i, z)) for i, task in enumerate(TASKS)}

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        features = (lambda: self.features(x)) if self.lazy else self.features(x)
        # the last task has no sample on the last rank, which evaluates its head all the same
        counts = dict.fromkeys(TASKS, len(x))
        counts[TASKS[-1]] *= RANK < WORLD_SIZE - 1
        if self.given:
            losses = {task: head(features) for task, head in self.losses(y).items()}
            return self.balancer(losses, counts=counts, parameters=self.trunk)
        return self.balancer(features, self.losses(y), counts=counts)


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 6, generator=generator), torch.randn(BATCH, 3, generator=generator)


def shards() -> list[slice]:
    """Ragged ones."""
    sizes = {1: [24], 2: [7, 17], 4: [1, 9, 4, 10]}[WORLD_SIZE]
    return [slice(sum(sizes[:r]), sum(sizes[: r + 1])) for r in range(WORLD_SIZE)]


class Reference:
    """One process on the concatenated batch, by plain autograd."""

    def __init__(self, net: Net) -> None:
        self.net = copy.deepcopy(net)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=0.05)

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        end = shards()[-1].start if WORLD_SIZE > 1 else BATCH
        z = self.net.trunk(x)
        present = {task: (slice(end) if task == TASKS[-1] else slice(None)) for task in TASKS}
        self.now = {task: self.net.losses(y[rows])[task](z[rows]) for task, rows in present.items()}
        rows = [
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, self.shared(), retain_graph=True)])
            for loss in self.now.values()
        ]
        matrix = torch.stack(rows).double()
        return matrix @ matrix.T

    def shared(self) -> list[Tensor]:
        return list(self.net.trunk.parameters())

    def step(self, weights: dict[str, float]) -> None:
        self.optimizer.zero_grad()
        sum(weights[task] * loss for task, loss in self.now.items()).backward()
        self.optimizer.step()


def run(name: str, probe: ParameterProbe, wrap: Callable[[Net], Any], **options: bool) -> None:
    torch.manual_seed(7)
    balancer = Balancer(TASKS, MGDA(), probe=probe)
    net = Net(balancer, **options)
    reference = Reference(net)
    step, full = wrap(net)
    mine = shards()[RANK]
    worst = 0.0
    for number in range(STEPS):
        x, y = data(number)
        expected = reference.gram(x, y)
        step(x[mine], y[mine])
        got = balancer.report.stats.gram
        norms = expected.diagonal().sqrt()
        worst = max(worst, float(((got - expected) / torch.outer(norms, norms)).abs().max()))
        reference.step(balancer.report.weights)
    assert balancer._synchronizer.world_size == WORLD_SIZE
    parameters = full()
    drift = max(float((parameters[n] - p.detach()).abs().max()) for n, p in reference.net.named_parameters())
    if RANK == 0:
        print(f"{name}: gram {worst:.2e} parameters {drift:.2e}", flush=True)


def native(net: Net, model: nn.Module) -> tuple[Callable, Callable]:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        model(x, y).backward()
        optimizer.step()

    def full() -> dict[str, Tensor]:
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach()
            for name, p in net.named_parameters()
        }

    return step, full


def ddp(**options: bool) -> Callable[[Net], Any]:
    return lambda net: native(net, DistributedDataParallel(net, **options))


def fsdp2(units: str, **options: bool) -> Callable[[Net], Any]:
    def wrap(net: Net) -> Any:
        mesh = init_device_mesh("cpu", (WORLD_SIZE,))
        modules = {
            "layers": [*net.trunk, *net.heads],
            "trunk": [net.trunk, *net.heads],
            "heads in the root": [net.trunk],
            "root only": [],
            "later layers in the root": [net.trunk[0]],
        }[units]
        for module in (*modules, net):
            fully_shard(module, mesh=mesh, **options)
        assert all(isinstance(p, DTensor) for p in net.parameters())
        return native(net, net)

    return wrap


def zero(stage: int) -> Callable[[Net], Any]:
    def wrap(net: Net) -> Any:
        import deepspeed
        from deepspeed.utils import safe_get_full_fp32_param

        config = {
            "train_micro_batch_size_per_gpu": 1,  # only its product with the others is checked
            "gradient_clipping": 1e6,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        engine, *_ = deepspeed.initialize(
            model=net, optimizer=optimizer, config=config, dist_init_required=False
        )
        assert engine.zero_optimization_stage() == stage
        assert engine.dp_world_size == WORLD_SIZE
        assert all(hasattr(p, "ds_id") == (stage == 3) for p in engine.module.parameters())

        def step(x: Tensor, y: Tensor) -> None:
            engine.backward(engine(x, y))
            engine.step()

        def full() -> dict[str, Tensor]:
            named = engine.module.named_parameters()
            return {n: safe_get_full_fp32_param(p).detach() if stage else p.detach() for n, p in named}

        return step, full

    return wrap


EXACT, SMALL = ParameterProbe(), ParameterProbe(bucket=WIDTH)  # one bucket; one parameter a bucket


def torch_cells() -> None:
    run("ddp", EXACT, ddp())
    run("ddp, small buckets", SMALL, ddp())
    run("ddp, static_graph", SMALL, ddp(static_graph=True))
    run("ddp, gradient_as_bucket_view", SMALL, ddp(gradient_as_bucket_view=True))
    run("ddp, checkpointed", SMALL, ddp(), checkpointed=True)
    run("ddp, given", EXACT, ddp(), given=True)
    run("ddp, evaluated again", ParameterProbe(reevaluate=True, bucket=WIDTH), ddp(), lazy=True)
    for units in ("layers", "trunk", "heads in the root", "root only", "later layers in the root"):
        run(f"fsdp2 {units}", EXACT, fsdp2(units))
        run(f"fsdp2 {units}, small buckets", SMALL, fsdp2(units))
    run("fsdp2 layers, kept", SMALL, fsdp2("layers", reshard_after_forward=False))
    run("fsdp2 trunk, kept", SMALL, fsdp2("trunk", reshard_after_forward=False))
    run("fsdp2 heads in the root, kept", EXACT, fsdp2("heads in the root", reshard_after_forward=False))
    with pytest.raises(RuntimeError, match="Shard the trunk's blocks as units of their own"):
        run("hidden unit", SMALL, fsdp2("heads in the root", reshard_after_forward=False))
    run("fsdp2 layers, checkpointed", SMALL, fsdp2("layers"), checkpointed=True)
    with pytest.raises(ValueError, match=r"parameters= holds parameters that FSDP2 .*shards"):
        run("given", EXACT, fsdp2("layers"), given=True)


def few_cells() -> None:
    run("ddp", EXACT, ddp())
    run("ddp, small buckets", SMALL, ddp())
    run("fsdp2 layers, small buckets", SMALL, fsdp2("layers"))


def deepspeed_cells() -> None:
    for stage in range(3):
        run(f"zero-{stage}", EXACT, zero(stage))
        run(f"zero-{stage}, small buckets", SMALL, zero(stage))
        run(f"zero-{stage}, given", EXACT, zero(stage), given=True)
    run("zero-3", EXACT, zero(3), lazy=True)
    run("zero-3, small buckets", SMALL, zero(3), lazy=True)
    with pytest.raises(ValueError, match="parameters= holds parameters that ZeRO-3 shards"):
        run("given", EXACT, zero(3), given=True)


def main() -> None:
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = start()
    {"torch": torch_cells, "few": few_cells, "deepspeed": deepspeed_cells}[sys.argv[1]]()
    gc.collect()
    assert dist.is_initialized() == (WORLD_SIZE > 1)
    stop()


if __name__ == "__main__":
    main()

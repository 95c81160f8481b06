"""SharedLayerProbe and mixtures on W ranks against explicit autograd on the whole batch in each process.

    shared_layer.py

Prints the number of comparisons. Every one is of the Gram (relative to the products of norms), or of all
parameters' gradients (relative to the largest), and is within 1e-6 in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from problem import SCENARIOS, TASKS, Net, global_batch, shard
from ranks import start, stop
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureProbe, SharedLayerProbe
from mtl_dist.probes import Probe
from mtl_dist.probes.sketch import CountSketch
from mtl_dist.weighting import MGDA

TOLERANCE = 1e-6
STEPS = 2
SKETCH = 50
LAYER_PROBES = (
    SharedLayerProbe(form="exact"),
    SharedLayerProbe(form="kernel"),
    SharedLayerProbe(form="exact", bias=True),
    SharedLayerProbe(form="kernel", bias=True),
    SharedLayerProbe(reevaluate=True),
    SharedLayerProbe(sketch=SKETCH),
)


def check_gram(what: object, got: Tensor, expected: Tensor) -> None:
    norms = expected.diagonal().sqrt()
    scale = torch.outer(norms, norms)
    error = ((got - expected).abs() / torch.where(scale > 0, scale, 1)).max()
    assert error <= TOLERANCE, f"{what}: Gram differs by {error:.1e}"


def check_gradients(what: object, got: nn.Module, expected: dict[str, Tensor]) -> None:
    largest = max(g.abs().max() for g in expected.values())
    for name, p in got.named_parameters():
        gradient = torch.zeros_like(p) if p.grad is None else p.grad
        error = (gradient - expected[name]).abs().max() / largest
        assert error <= TOLERANCE, f"{what}: gradient of {name} differs by {error:.1e}"


def explicit_gram(losses: list[Tensor | None], parameters: list[Tensor], probe: Probe, step: int) -> Tensor:
    """Gram of the losses' gradients, in the probe's own sketch where it has one."""
    rows = [torch.zeros(sum(p.numel() for p in parameters)) for _ in losses]
    for row, loss in zip(rows, losses, strict=True):
        if loss is not None:
            found = torch.autograd.grad(loss, parameters, retain_graph=True)
            row += torch.cat([g.T.flatten() for g in found])  # inputs first, as the probe sketches them
    matrix = torch.stack(rows).double()
    if isinstance(probe, SharedLayerProbe) and probe.sketch is not None:
        sketch = CountSketch(probe.sketch, (probe.seed << 32) + step)
        total = sketch.zeros(len(rows), matrix.device, torch.float64)
        sketch.add_(total, matrix, 0)
        matrix = sketch.fold(total)
    return matrix @ matrix.T


def weighted_gradients(net: nn.Module, losses: list[Tensor | None], weights: Tensor) -> dict[str, Tensor]:
    present = [w * loss for w, loss in zip(weights.float(), losses, strict=True) if loss is not None]
    net.zero_grad()
    if present:
        sum(present).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in net.named_parameters()}


def wrapped(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net, find_unused_parameters=True) if WORLD_SIZE > 1 else net


def check_tasks(probe: SharedLayerProbe, scenario: str) -> int:
    """Every sample has all tasks, or some."""
    torch.manual_seed(7)
    net = Net(Balancer(TASKS, MGDA(), probe=probe))
    reference, model = copy.deepcopy(net), wrapped(net)
    for step in range(STEPS):
        batch = global_batch(step, scenario)
        model.zero_grad()
        model(shard(batch, RANK, WORLD_SIZE, scenario)).backward()
        z = reference.trunk(batch.inputs)
        losses = [reference._head(i, batch)(z) for i in range(len(TASKS))]
        last = reference.trunk[2]
        parameters = [last.weight, last.bias] if probe.bias else [last.weight]
        what = (probe, scenario, step)
        check_gram(what, net.balancer.report.stats.gram, explicit_gram(losses, parameters, probe, step))
        weights = net.balancer.report.weight_vector
        check_gradients(what, net, weighted_gradients(reference, losses, weights))
    return STEPS


class TokenNet(nn.Module):
    """Tokens with a task each sequence, `[B, 3, 5]`; one output head for all."""

    def __init__(self, balancer: Balancer) -> None:
        super().__init__()
        self.balancer = balancer
        self.trunk = nn.Sequential(nn.Linear(5, 9), nn.Tanh())
        self.head = nn.Linear(9, 7)

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")

    def forward(self, x: Tensor, labels: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
        hidden = self.trunk(x)
        if self.balancer.probe.takes_layers:
            return self.balancer(
                hidden, lambda z: self.losses(z, labels), layer=self.head, task_ids=ids, mask=mask
            )
        return self.balancer(hidden, lambda z: self.losses(self.head(z), labels), task_ids=ids, mask=mask)


def mixture(step: int, masked: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Five tasks: one of them in the first sequence only, one nowhere at odd steps."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(24, 3, 5, generator=generator)
    labels = torch.randint(0, 7, (24, 3), generator=generator)
    ids = torch.randint(1, 4 + (step + 1) % 2, (24,), generator=generator)
    ids[0] = 0
    mask = torch.rand(24, 3, generator=generator) < 0.6 if masked else None
    if mask is not None:
        ids[5], mask[5] = -1, False  # a sequence without a task
    return x, labels, ids, mask


def sizes(scenario: str) -> list[int]:
    even = [24 // WORLD_SIZE] * WORLD_SIZE
    ragged = {1: [24], 2: [7, 17], 4: [1, 0, 9, 14]}[WORLD_SIZE]
    return ragged if scenario == "ragged" else even


def check_mixture(probe: Probe, scenario: str, masked: bool) -> int:
    """Every sample has one task."""
    torch.manual_seed(7)
    tasks = [f"domain{i}" for i in range(5)]
    net = TokenNet(Balancer(tasks, MGDA(), probe=probe))
    reference, model = copy.deepcopy(net), wrapped(net)
    begin = sum(sizes(scenario)[:RANK])
    own = slice(begin, begin + sizes(scenario)[RANK])
    for step in range(STEPS):
        x, labels, ids, mask = mixture(step, masked)
        model.zero_grad()
        model(x[own], labels[own], ids[own], None if mask is None else mask[own]).backward()
        hidden = reference.trunk(x)
        each = reference.losses(reference.head(hidden), labels)
        counted = torch.ones_like(each) if mask is None else mask.float()
        losses: list[Tensor | None] = []
        for task in range(5):
            weight = counted * (ids == task)[:, None]
            losses.append((weight * each).sum() / weight.sum() if weight.sum() > 0 else None)
        at = [reference.head.weight] if isinstance(probe, SharedLayerProbe) else [hidden]
        what = (probe, scenario, masked, step)
        gram = explicit_gram(losses, at, probe, step)
        check_gram(what, net.balancer.report.stats.gram, gram)
        off_diagonal = (gram - gram.diag().diag()).abs().max()
        assert (off_diagonal == 0) == isinstance(probe, FeatureProbe), what
        check_gradients(what, net, weighted_gradients(reference, losses, net.balancer.report.weight_vector))
        expected = torch.stack([torch.tensor(0.0) if loss is None else loss.detach() for loss in losses])
        stats = net.balancer.report.stats
        torch.testing.assert_close((stats.losses * stats.present).float(), expected, rtol=1e-6, atol=0)
        assert stats.counts.sum() == counted.sum(), what
    return STEPS


def comparisons() -> Iterator[int]:
    for scenario in SCENARIOS:
        for probe in LAYER_PROBES:
            yield check_tasks(probe, scenario)
    probes = [FeatureProbe(), FeatureProbe(reevaluate=True), *(p for p in LAYER_PROBES if not p.bias)]
    for scenario in ("even", "ragged"):
        for probe in probes:
            for masked in (False, True):
                yield check_mixture(probe, scenario, masked)


def main() -> None:
    global RANK, WORLD_SIZE
    RANK, WORLD_SIZE = start()
    number = sum(comparisons())
    if WORLD_SIZE > 1:
        assert dist.get_world_size() == WORLD_SIZE
    if RANK == 0:
        print(f"{number} comparisons on {WORLD_SIZE} ranks")
    stop()


if __name__ == "__main__":
    main()

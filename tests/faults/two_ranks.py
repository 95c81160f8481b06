"""Faults of losses and features on two ranks, one case after the other.

    two_ranks.py OUT

Each rank writes `OUT.RANK`: a JSON mapping from case to [error type, message], to a largest relative error,
or to null.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ranks import start, stop
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist import Balancer, FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.weighting import MGDA, Equal, InverseGradNorm

ROWS = [5, 3]  # samples of each rank
DATA = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def mine(rank: int) -> Tensor:
    return DATA[: ROWS[0]] if rank == 0 else DATA[ROWS[0] :]


def derivative(u: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


class Pinn(nn.Module):
    """A PDE residual and a boundary loss, balanced by all shared parameters."""

    def __init__(self, probe: Any = None, rule: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head = nn.Linear(8, 1)
        self.balancer = Balancer(["pde", "bc"], rule or InverseGradNorm(), probe=probe)
        self.double()

    def losses(self, z: Tensor, x: Tensor) -> dict[str, Tensor]:
        slope = derivative(self.head(z), x)
        curve = derivative(slope[:, 0], x)[:, 0] + derivative(slope[:, 1], x)[:, 1]
        return {"pde": (curve - 1).square().mean(), "bc": self.head(z).square().mean()}

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        heads = {task: (lambda z, task=task: self.losses(z, x)[task]) for task in ("pde", "bc")}
        counts = dict.fromkeys(("pde", "bc"), len(x))
        loss: Tensor = self.balancer(self.trunk(x), heads, counts=counts)
        return loss


def error(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((g - e).abs().max() / e.abs().max()) for g, e in zip(got, expected, strict=True))


def derivatives_are_those_of_the_whole_batch(rank: int) -> float:
    """Statistics and gradients under DDP, with 5 and 3 samples, against one process with 8."""
    net = Pinn(ParameterProbe(bucket=30))
    wrapped = DistributedDataParallel(net)  # kept: a DDP model that is gone does not reduce
    wrapped(mine(rank)).backward()
    alone = Pinn()
    x = DATA.clone().requires_grad_()
    losses = alone.losses(alone.trunk(x), x)
    shared = list(alone.trunk.parameters())
    rows = []
    for loss in losses.values():
        found = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if g is None else g for g, p in zip(found, shared, strict=True)]
        rows.append(torch.cat([part.flatten() for part in parts]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    weights = gram.diagonal().rsqrt()
    sum(w * loss for w, loss in zip(weights, losses.values(), strict=True)).backward()
    got = [net.balancer.report.stats.gram, *(p.grad for p in net.parameters())]
    return error(got, [gram, *(p.grad for p in alone.parameters())])


def parameters_as_features(rank: int) -> float:
    x = torch.arange(1.0, 9).reshape(2, 4)[rank]
    p = nn.Parameter(torch.ones(1))
    balancer = Balancer(["a", "b"], InverseGradNorm(), probe=ParameterProbe())
    balancer(p, {"a": lambda p: (p * x).mean(), "b": lambda p: (p * x.square()).mean()})
    return error([torch.tensor(list(balancer.report.grad_norms.values()))], [torch.tensor([4.5, 25.5])])


def parameters_as_features_at_the_features(rank: int) -> None:
    p = nn.Parameter(torch.ones(1))
    Balancer(["a", "b"], MGDA())(p, {"a": lambda p: p.sum(), "b": lambda p: p.square().sum()})


class Heads(nn.Module):
    """Rank 1 has no sample of "b", or of any task, and writes it in one of the usual ways."""

    def __init__(self, write: str, empty: tuple[str, ...], **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.a, self.b = nn.Linear(2, 8), nn.Linear(8, 1), nn.Linear(8, 1)
        self.balancer = Balancer(["a", "b"], Equal(), **settings)
        self.double()
        self.write, self.empty = write, empty

    def loss(self, task: str, z: Tensor, absent: bool) -> Tensor:
        e = (getattr(self, task)(z).squeeze(-1) - 1).square()
        if not absent:
            return e.mean()
        ways = {
            "masked mean": lambda: (0 * e).sum() / (0 * e.detach()).sum(),
            "no row": lambda: e[:0].mean(),
            "constant": lambda: z.new_zeros(()),
        }
        return ways[self.write]()

    def forward(self, x: Tensor, rank: int) -> Tensor:
        absent = {task: rank == 1 and task in self.empty for task in ("a", "b")}
        heads = {task: (lambda z, task=task: self.loss(task, z, absent[task])) for task in ("a", "b")}
        counts = {task: 0 if absent[task] else len(x) for task in ("a", "b")}
        loss: Tensor = self.balancer(self.trunk(x), heads, counts=counts)
        return loss


def empty_heads(rank: int) -> float:
    """NaN of losses with count 0 reaches nobody, and DDP waits for nobody."""
    worst = 0.0
    for write in ("masked mean", "no row", "constant"):
        for empty in (("b",), ("a", "b")):
            for probe in (None, FeatureProbe(), FeatureTap(), ParameterProbe()):
                net = Heads(write, empty, probe=probe)
                wrapped = DistributedDataParallel(net, find_unused_parameters=write == "constant")
                for _ in range(2):
                    net.zero_grad()
                    wrapped(mine(rank), rank).backward()
                alone = Heads(write, empty)
                rows = {t: DATA[: ROWS[0]] if t in empty else DATA for t in ("a", "b")}
                losses = [alone.loss(t, alone.trunk(rows[t]), False) for t in ("a", "b")]
                if isinstance(probe, FeatureTap):  # heads keep their own gradient
                    losses = [2 * loss for loss in losses]
                (sum(losses) / 2).backward()
                pairs = list(zip(net.parameters(), alone.parameters(), strict=True))
                pairs = pairs[2:] if isinstance(probe, FeatureTap) else pairs
                worst = max(worst, error([p.grad for p, _ in pairs], [q.grad for _, q in pairs]))
    return worst


def losses_alone_are_constants_on_one_rank(rank: int) -> float:
    w = torch.ones((), requires_grad=True)
    given = {"a": 2 * w, "b": 3 * w} if rank == 0 else {"a": w.new_zeros(()), "b": w.new_zeros(())}
    Balancer(["a", "b"], Equal())(given, counts=dict.fromkeys("ab", 1 - rank)).backward()
    return 0.0 if rank == 1 or w.grad == 5.0 else float(w.grad)


def untouched_term(rank: int) -> float:
    """`balancer(...) + term` trains the mean of the term over ranks, each with its local mean."""
    net = Heads("no row", ())

    class Plus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            loss: Tensor = self.net(x, 0) + 0.1 * self.net.trunk(x).square().mean()
            return loss

    x = DATA[4 * rank : 4 * rank + 4]
    wrapped = DistributedDataParallel(Plus())
    wrapped(x).backward()
    alone = Heads("no row", ())
    z = alone.trunk(DATA)
    ((alone.loss("a", z, False) + alone.loss("b", z, False)) / 2 + 0.1 * z.square().mean()).backward()
    return error([p.grad for p in net.parameters()], [p.grad for p in alone.parameters()])


def features() -> Tensor:
    return torch.tensor([1.0, 2.0], requires_grad=True) * 1


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {"a": lambda z: z.sum(), "b": lambda z: z.square().sum()}


def wrong_count(value: Any) -> Callable[[int], None]:
    return lambda rank: Balancer(["a", "b"], MGDA())(
        features(), PLAIN, counts={"a": 1, "b": value if rank == 1 else 1}
    )


def wrong_mask(rank: int) -> None:
    z = torch.ones(4, 2, requires_grad=True) * 1
    mask = torch.full((4,), -1.0 if rank == 1 else 1.0)
    Balancer(["a", "b"], Equal())(z, lambda z: z.sum(1), task_ids=torch.arange(4) % 2, mask=mask)


def bypass(rank: int) -> None:
    z = features()
    Balancer(["a", "b"], MGDA())(
        z, lambda own: {"a": own.sum(), "b": (z if rank == 1 else own).square().sum()}
    )


def hidden_object(rank: int) -> None:
    z = features()
    Balancer(["a", "b"], MGDA())((z, object()) if rank == 1 else (z,), {"a": lambda f: f[0].sum()})


def layer_with_a_hook(rank: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    if rank == 1:
        layer.register_forward_hook(lambda module, args, out: 2 * out)
    Balancer(["a", "b"], MGDA(), probe=SharedLayerProbe())(features(), PLAIN, layer=layer)


def derivative_under_the_tap(rank: int) -> None:
    net = Pinn(FeatureTap())
    x = mine(rank).clone().requires_grad_()
    z = net.trunk(x)
    heads = {
        "pde": (lambda z: net.losses(z, x)["pde"]) if rank == 1 else (lambda z: z.sum()),
        "bc": lambda z: net.head(z).square().mean(),
    }
    net.balancer(z, heads).backward()


def factor_zero(rank: int) -> None:
    balancer = Balancer(["a", "b"], MGDA(), probe=FeatureTap())
    ((1 - rank) * balancer(features(), PLAIN)).backward()


def exact_zero(rank: int) -> None:
    from mtl_dist.weighting import GeometricMean

    Balancer(["a", "b"], GeometricMean())(features(), {**PLAIN, "b": lambda z: 0 * z.sum()})


CASES: dict[str, Callable[[int], float | None]] = {
    "derivatives": derivatives_are_those_of_the_whole_batch,
    "parameters as features": parameters_as_features,
    "parameters at the features": parameters_as_features_at_the_features,
    "empty heads": empty_heads,
    "losses alone are constants": losses_alone_are_constants_on_one_rank,
    "untouched term": untouched_term,
    "negative count": wrong_count(torch.tensor(-4.0)),
    "NaN count": wrong_count(torch.tensor(torch.nan)),
    "vector count": wrong_count(torch.tensor([1, 2])),
    "string count": wrong_count("8"),
    "negative mask": wrong_mask,
    "bypass": bypass,
    "hidden object": hidden_object,
    "layer with a hook": layer_with_a_hook,
    "derivative under the tap": derivative_under_the_tap,
    "factor zero": factor_zero,
    "exactly zero": exact_zero,
}


def main() -> None:
    rank, _ = start()
    results: dict[str, Any] = {}
    for case, run in CASES.items():
        try:
            results[case] = run(rank)
        except Exception as error:
            results[case] = [type(error).__name__, str(error)]
    Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps(results))
    stop()


if __name__ == "__main__":
    main()

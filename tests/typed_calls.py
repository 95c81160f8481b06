"""Read by mypy, never run: a type checker knows the forms of a balancer's call, and refuses others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mtl_dist import Balancer, Elapsed, Engine, Finding, OnNonfinite
from mtl_dist.weighting import MGDA


def right(balancer: Balancer, z: Tensor, losses: dict[str, Tensor | None], ids: Tensor) -> Tensor:
    """Every form that `docs/usage.md` shows."""
    total = balancer(losses)
    total = balancer(losses, counts={"a": 3, "b": torch.tensor(2.0)})
    total = balancer(z, {"a": lambda z: z.sum(), "b": lambda z: None})
    total = balancer((z, {"more": z}), lambda z: losses, counts={"a": 3})
    total = balancer(z, lambda z: losses, layer=nn.Linear(1, 1))
    total = balancer(z, lambda z: z.sum(1), task_ids=ids, mask=ids)
    total = balancer(losses, parameters=nn.Linear(1, 1)) + balancer(losses, counts={"a": 3}, parameters=[z])
    return total + balancer(z, task_ids=ids)


def wrong(balancer: Balancer, z: Tensor, losses: dict[str, Tensor | None]) -> None:
    """Mypy reports an unused `type: ignore` where such a call becomes possible."""
    balancer(z)  # type: ignore[call-overload]
    balancer(losses, layer=nn.Linear(1, 1))  # type: ignore[call-overload]
    balancer(z, {"a": 1.0})  # type: ignore[dict-item]
    balancer(z, lambda z: losses, weights=z)  # type: ignore[call-overload]


def public(policy: OnNonfinite) -> tuple[tuple[Finding, ...], Elapsed | None]:
    """What stands in public signatures can be imported."""
    balancer = Balancer(["a", "b"], MGDA(), on_nonfinite=policy)
    balancer.set_engine(Engine(accumulation=2))
    return balancer.findings, None if balancer.report is None else balancer.report.sync

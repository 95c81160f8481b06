"""Relative: one task keeps the weight 1, and the weights of the others are relative to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Combinator, State, nest, unnest
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Relative(Combinator):
    """`αᵢ ← αᵢ / |αᵣ|`, so that the reference task r has the weight 1, and its learning rate stays right.

    A rule such as `InverseGradNorm` gives weights in the unit of 1/gradient, which may be hundreds. The
    optimizer's learning rate was chosen for the client's own weights. Here the reference task trains as it
    did, and the others follow. With `InverseGradNorm`, this is the adaptive weight of VQGAN (Esser et al.,
    CVPR 2021), `‖gᵣ‖ / ‖gᵢ‖`.

    Where the reference task is absent, or the inner rule gives it the weight 0, the latest divisor is used
    again (1 before there is one). A negative weight of the reference task becomes -1.

    Attributes:
        rule: the inner rule.
        to: name of the reference task.
    """

    name = "relative"
    paper = "combinator"
    cost = "O(n) + inner rule"

    to: str

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # as in Combinator
        """(0, 0): the scale of the inner weights has no influence."""
        return None if self.rule.degrees is None else (0, 0)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Which task is the reference, the latest divisor, and the state of the inner rule."""
        if self.to not in tasks:
            raise ValueError(f"Relative: to must be one of the tasks {list(tasks)}, got {self.to!r}")
        reference = torch.tensor([task == self.to for task in tasks], device=device)
        divisor = constant(1.0, 1, device)[0]
        return {"reference": reference, "divisor": divisor, **nest("rule", self.rule.init(tasks, device))}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ ← αᵢ / |αᵣ|`."""
        weights, inner = self.rule.update(stats, unnest("rule", state))
        reference = state["reference"]
        of_reference = torch.where(reference & stats.present, weights, 0).sum().abs()
        divisor = torch.where(of_reference > 0, of_reference, state["divisor"])
        return weights / divisor, {"reference": reference, "divisor": divisor, **nest("rule", inner)}

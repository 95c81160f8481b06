"""AdaptiveWeight: gradients as long as that of a reference task, as VQGAN weighs its adversarial loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_positive
from mtl_dist.weighting.helpers import constant, per_task


@dataclass(frozen=True)
class AdaptiveWeight(Rule):
    """`αᵣ = 1` for the reference task r, `αⱼ = wⱼ min(‖gᵣ‖ / (‖gⱼ‖ + ε), m)` for the others.

    Esser et al., CVPR 2021 (VQGAN): r is the reconstruction loss, j the adversarial loss, and g are the
    gradients at the last layer of the decoder (use `SharedLayerProbe`), `w = 0.8`, `m = 1e4`. The paper has
    ε = 1e-6 and the code 1e-4. This is in the unit of the gradients, and decides the weight where gradients
    are short; so it is 0 here. The published code takes the norms of each rank's own gradients, so ranks use
    different weights. Here the norms are those of the global gradients, the same on every rank.

    Leave a loss out (None) as long as it must not act, such as the adversarial loss in the first steps. If
    the reference is absent, its latest norm is used again; before there is one, `αⱼ = wⱼ`. The gradient of a
    task may be zero: its ratio is then m, or 0 if that of the reference is zero too.

    Attributes:
        reference: name of the reference task r.
        weights: wⱼ > 0, by task name; 0.8 for a task that is not named.
        max_ratio: m.
        eps: ε >= 0.
    """

    name = "adaptive_weight"
    paper = "Esser et al., CVPR 2021"
    cost = "O(n)"
    needs = Needs.NORMS

    reference: str
    weights: Mapping[str, float] | None = None
    max_ratio: float = 1e4
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "weights", self.weights or {})
        check_positive(self, "max_ratio", self.max_ratio)
        check_positive(self, "eps", self.eps, zero=True)

    @property
    def degrees(self) -> tuple[float, float] | None:  # type: ignore[override]  # depends on a setting
        """(0, 0); None with ε, which is in the unit of the gradients."""
        return None if self.eps else (0, 0)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """The first name is that of the reference."""
        return cls(min(tasks))

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """w, which task is the reference, and its latest norm (0: none yet)."""
        if self.reference not in tasks:
            raise ValueError(
                f"AdaptiveWeight: reference must be one of the tasks {list(tasks)}, got {self.reference!r}"
            )
        name = "AdaptiveWeight: weights"
        return {
            "weights": per_task(self.weights or {}, tasks, device, name, default=0.8, partial=True),
            "reference": torch.tensor([task == self.reference for task in tasks], device=device),
            "norm": constant(0.0, 1, device)[0],
            "seen": torch.zeros((), dtype=torch.bool, device=device),
        }

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵣ = 1`, `αⱼ = wⱼ min(‖gᵣ‖ / (‖gⱼ‖ + ε), m)`."""
        reference, norms = state["reference"], stats.grad_norms
        here = reference & stats.present
        seen = state["seen"] | here.any()
        norm = torch.where(here.any(), torch.where(here, norms, 0.0).sum(), state["norm"])
        # αⱼ = wⱼ min(‖gᵣ‖ / (‖gⱼ‖ + ε), m)
        length = norms + self.eps
        at_zero = torch.where(norm > 0, self.max_ratio, 0.0).to(norms.dtype)
        ratio = torch.where(length > 0, norm / torch.where(length > 0, length, 1.0), at_zero)
        ratio = torch.where(seen, ratio.clamp(max=self.max_ratio), 1.0)
        return torch.where(reference, 1.0, state["weights"] * ratio), {**state, "norm": norm, "seen": seen}

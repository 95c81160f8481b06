"""EnCodec balancer: each loss contributes a given share of the total gradient norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_fraction, check_positive
from mtl_dist.weighting.helpers import constant, per_task


@dataclass(frozen=True)
class Encodec(Rule):
    """`αᵢ = (wᵢ / Σⱼwⱼ) · R / ⟨‖gᵢ‖⟩`, where `⟨·⟩` is a bias-corrected moving average.

    Défossez et al., "High fidelity neural audio compression", 2022. There gᵢ is the gradient at the model's
    output. To do the same, pass the output to the balancer as the features. audiocraft averages the norms of
    the samples, first on each rank and then over ranks; here ‖gᵢ‖ is the norm over the whole global batch.
    audiocraft adds 1e-12 to the norm; this rule does not. A task whose gradients were always zero counts with
    the largest average of the other tasks. If all gradients were always zero, the weights are `wᵢ R / Σⱼwⱼ`.

    Attributes:
        weights: the shares w > 0, by task name or in task order; None is equal shares.
        total_norm: R, the norm of the weighted sum if all gradients have the same direction.
        decay: decay of the moving average, in [0, 1).
    """

    name = "encodec"
    paper = "Défossez et al., 2022"
    cost = "O(n)"
    degrees = (0, -1)

    weights: Mapping[str, float] | Sequence[float] | None = None
    total_norm: float = 1.0
    decay: float = 0.999

    needs = Needs.NORMS

    def __post_init__(self) -> None:
        check_positive(self, "total_norm", self.total_norm)
        if self.weights is not None:
            check_positive(self, "weights", self.weights)
        check_fraction(self, "decay", self.decay, one=False)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Shares, discounted sums of the norms, sums of the discounts."""
        zeros = constant(0.0, len(tasks), device)
        shares = per_task(self.weights, tasks, device, "Encodec: weights", default=1.0)
        return {"shares": shares, "sum": zeros, "norm": zeros.clone()}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = (wᵢ / Σⱼwⱼ) R / ⟨‖gᵢ‖⟩`, where the average includes this step."""
        present, w = stats.present, state["shares"]
        # S ← dS + ‖g‖, N ← dN + 1, ⟨‖g‖⟩ = S / N
        total = torch.where(present, self.decay * state["sum"] + stats.grad_norms, state["sum"])
        norm = torch.where(present, self.decay * state["norm"] + 1, state["norm"])
        average = torch.where(present, total / norm.clamp(min=1), 0.0)
        largest = average.amax()
        average = torch.where(average > 0, average, torch.where(largest > 0, largest, 1.0))
        # αᵢ = (wᵢ / Σⱼwⱼ) R / ⟨‖gᵢ‖⟩
        share = w / torch.where(present.any(), torch.where(present, w, 0.0).sum(), w.sum())
        return share * self.total_norm / average, {"shares": w, "sum": total, "norm": norm}

"""EnCodec balancer: each loss has its given share of the gradient that reaches the output."""

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
    """`αᵢ = (wᵢ / Σⱼwⱼ) · R / ⟨‖gᵢ‖⟩`, `⟨·⟩` a bias-corrected moving average: shares w of a total length R.

    Défossez et al., "High fidelity neural audio compression", 2022. There gᵢ is the gradient at the model's
    output: hand the balancer the output as features. audiocraft averages the norms of the batch's items,
    and its average is local to a rank before it is averaged again; here ‖gᵢ‖ is the norm over the whole
    global batch. Its absolute 1e-12 is left out: a task whose gradients were all zero counts with the
    largest average of the others, and where all were zero the weights are `wᵢ R / Σⱼwⱼ`.

    Attributes:
        weights: the shares w, by name or in task order; None is equal.
        total_norm: R, length that the weighted gradients add up to where they are parallel.
        decay: of the moving average, in [0, 1).
    """

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
        """Shares, discounted sum of norms, sum of discounts."""
        zeros = constant(0.0, len(tasks), device)
        shares = per_task(self.weights, tasks, device, "Encodec: weights", default=1.0)
        return {"shares": shares, "sum": zeros, "norm": zeros.clone()}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`αᵢ = (wᵢ / Σⱼwⱼ) R / ⟨‖gᵢ‖⟩`, this step's norms included."""
        present, w = stats.present, state["shares"]
        # S <- dS + ||g||, N <- dN + 1, <||g||> = S / N
        total = torch.where(present, self.decay * state["sum"] + stats.grad_norms, state["sum"])
        norm = torch.where(present, self.decay * state["norm"] + 1, state["norm"])
        average = torch.where(present, total / norm.clamp(min=1), 0.0)
        largest = average.amax()
        average = torch.where(average > 0, average, torch.where(largest > 0, largest, 1.0))
        # α_i = (w_i / Σ_j w_j) R / <||g_i||>
        share = w / torch.where(present.any(), torch.where(present, w, 0.0).sum(), w.sum())
        return share * self.total_norm / average, {"shares": w, "sum": total, "norm": norm}

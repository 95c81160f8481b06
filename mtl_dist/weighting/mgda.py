"""MGDA: the shortest convex combination of the task gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from torch import Tensor

from mtl_dist.solvers import Array, min_norm_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_choice
from mtl_dist.weighting.helpers import on_present

Normalization = Literal["none", "l2", "loss", "loss+"]


@dataclass(frozen=True)
class MGDA(Rule):
    """Multiple-gradient descent: `α = argmin αᵀGα` over the simplex, solved exactly.

    `u = Σ αᵢgᵢ` satisfies `⟨gᵢ, u⟩ >= ‖u‖²` for every task. So no loss rises to first order, and `u = 0` if
    and only if the point is Pareto-stationary. If several α give the same u (linearly dependent gradients),
    the rule returns the most equal ones. Tasks with zero gradient share all the weight.

    With a normalisation s, a minimises `‖Σ aᵢgᵢ/sᵢ‖` over the simplex, and `αᵢ = aᵢ/sᵢ`. So u is the
    minimised combination, and no loss rises along it. LibMTL does the same for parameter gradients. Sener's
    code, and LibMTL for representations, multiply the losses by `aᵢ` instead and lose this guarantee.

    Sener and Koltun, NeurIPS 2018; Désidéri 2012. Their Frank-Wolfe and projected-gradient iterations stop at
    a tolerance. Here the optimality conditions hold up to rounding.

    Attributes:
        normalization: sᵢ is 1 ("none"), `‖gᵢ‖` ("l2"), `Lᵢ` ("loss") or `Lᵢ‖gᵢ‖` ("loss+"). For a task with
            zero gradient, `‖gᵢ‖` is replaced by the mean norm of the other tasks.
    """

    name = "mgda"
    paper = "Sener and Koltun, NeurIPS 2018"
    cost = "QP, host"
    needs = Needs.GRAM

    normalization: Normalization = "none"

    def __post_init__(self) -> None:
        check_choice(self, "normalization", self.normalization, get_args(Normalization))

    @property
    def positive_losses(self) -> bool:  # type: ignore[override]  # depends on a setting
        """Whether the rule divides gradients by losses."""
        return self.normalization in ("loss", "loss+")

    @property
    def degrees(self) -> tuple[float, float]:  # type: ignore[override]  # depends on a setting
        """That of `1/sᵢ`."""
        return (-1 if "loss" in self.normalization else 0, -1 if self.normalization in ("l2", "loss+") else 0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Minimum-norm weights. Without a normalisation they sum to 1 over the tasks present."""
        return on_present(self._solve, stats, stats.losses), state

    def _solve(self, gram: Array, losses: Array) -> Array:
        s = np.ones(len(gram))
        if self.normalization in ("l2", "loss+"):
            lengths = np.sqrt(gram.diagonal())
            s *= np.where(lengths > 0, lengths, lengths.sum() / max(np.count_nonzero(lengths), 1) or 1.0)
        if self.normalization in ("loss", "loss+"):
            s *= losses
        # a = argmin ‖Σ aᵢgᵢ/sᵢ‖²
        a = min_norm_weights(gram / np.outer(s, s))
        # αᵢ = aᵢ/sᵢ
        result: Array = a / s
        return result

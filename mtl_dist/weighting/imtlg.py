"""IMTL-G: the update whose projections on all task gradients are equal."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import EPS, Array, among_nonzero, cosines, equal_projections
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.helpers import on_present


@dataclass(frozen=True)
class IMTLG(Rule):
    """`⟨u, gᵢ/‖gᵢ‖⟩` equal for all tasks and `|Σ αᵢ| = 1`: `α = v/|Σ v|`, `v = D⁻¹C⁺1`.

    C holds the cosines, D the norms; `v = G⁻¹d` where G is regular.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, equation 6. The paper divides by `Σ v`, and
    where that is negative its update raises every loss; dividing by `|Σ v|` keeps the common projection
    positive. LibMTL inverts a matrix without regularisation; TorchJD takes `v = G⁺d`, which for linearly
    dependent gradients of unequal length is no longer blind to those lengths, as the method means to be, and
    returns zeros where `|Σ v|` is below 1e-12. Weights can be negative, and are large where `Σ v` is near 0:
    there the condition `|Σ αᵢ| = 1` has nothing to hold on to. Where the unit gradients cancel they are 0. A
    task without gradient gets the mean of the others' weights.
    """

    needs = Needs.GRAM

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = v/|Σ v|`."""
        return on_present(among_nonzero(_solve), stats), state


def _solve(gram: Array) -> Array:
    cosine, lengths = cosines(gram)
    # v = D⁻¹ C⁺ 1
    v = equal_projections(cosine, np.ones(len(gram))) / lengths
    total = np.abs(v).sum()
    # α = v / |Σ v|
    result: Array = v / max(abs(v.sum()), len(gram) * EPS * total) if total > 0 else np.zeros_like(v)
    return result

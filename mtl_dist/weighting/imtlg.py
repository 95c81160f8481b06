"""IMTL-G: the update with equal projections on all unit gradients."""

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

    C contains the cosines, D the norms. If G is regular, `v = G⁻¹d` with the vector of norms d.

    Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, equation 6. The paper divides by `Σ v`. If
    `Σ v` is negative, its update raises every loss. Dividing by `|Σ v|` keeps the common projection positive.
    LibMTL inverts a matrix without regularisation. TorchJD uses `v = G⁺d`; for linearly dependent gradients
    this depends on their lengths, which the method is meant to ignore. It also returns zeros if `|Σ v|` is
    below 1e-12. Weights can be negative. They are large if `Σ v` is near 0, where `|Σ αᵢ| = 1` is badly
    conditioned. They are 0 if the unit gradients cancel. A task with zero gradient gets the mean of the other
    weights.
    """

    name = "imtlg"
    paper = "Liu et al., ICLR 2021"
    cost = "O(n³), host"
    degrees = (0, 0)
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

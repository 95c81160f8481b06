"""ConFIG: the update with equal projections on all unit gradients."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mtl_dist.solvers import Array, among_nonzero, cosines, equal_projections
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import State
from mtl_dist.weighting.preference_rule import PreferenceRule


@dataclass(frozen=True)
class ConFIG(PreferenceRule):
    """Conflict-free inverse gradients: direction `x = Û⁺w`, length `Σᵢ ⟨gᵢ, x/‖x‖⟩`, with unit gradients Û.

    In terms of G: `a = D⁻¹(D⁻¹GD⁻¹)⁺w`, `α = (1ᵀGa / aᵀGa) a`, with the norms D. If `w = 1`, the update has
    the same angle to every gradient. This is the direction of IMTL-G, with another length.

    Liu, Chu and Thuerey, ConFIG, ICLR 2025, arXiv 2408.11104, equation 2; their package is `conflictfree`.
    That package and TorchJD compute the pseudo-inverse of the matrix of all gradients. Weights can be
    negative. If gradients are linearly dependent, the projections are equal in the least-squares sense, and
    losses can rise. If the unit gradients cancel (`Û⁺w = 0`), the weights are 0. A task with zero gradient is
    left out of the problem and gets the mean of the other weights.

    Attributes:
        preference: `w`, the projections on the unit gradients, up to a factor; None is 1.
    """

    name = "conflict_free"
    paper = "Liu, Chu and Thuerey, ICLR 2025"
    cost = "O(n³), host"
    degrees = (0, 0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = (1ᵀGa / aᵀGa) a`."""
        return self.on_preferred(among_nonzero(_solve), stats, state, mean=False), state


def _solve(gram: Array, preference: Array) -> Array:
    cosine, lengths = cosines(gram)
    # b = C⁺ w, a = D⁻¹ b
    b = equal_projections(cosine, preference)
    square = b @ cosine @ b
    if square <= 0 or not np.any(b):
        return np.zeros_like(b)
    # α = (1ᵀGa / aᵀGa) a
    result: Array = (lengths @ cosine @ b / square) * b / lengths
    return result

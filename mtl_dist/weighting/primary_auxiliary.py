"""PrimaryAuxiliary: main tasks improve, auxiliary tasks may only not rise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mtl_dist.solvers import Array, min_norm_weights
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.helpers import constant, on_present


@dataclass(frozen=True)
class PrimaryAuxiliary(Rule):
    """`min ‖g(α) + g(λ)‖²` over primary weights α in the simplex and auxiliary weights `λ >= 0`.

    With one primary task this is `u = argmax ⟨u, g₀⟩ - ½‖u‖²` subject to `⟨u, gᵢ⟩ >= 0` for the auxiliaries:
    the update nearest to g₀ along which none of them rises, `u = g₀ + Σ λᵢgᵢ`. With several, every primary
    has `⟨u, gᵢ⟩ >= ‖u‖²` as in MGDA. An auxiliary that does not conflict has λ = 0, and so does its head.

    Su, "On multi-task learning III", kexue.fm/archives/8907. The article refits one λ at a time and never
    shrinks one that has become too large: for g₀ = (-2, -1), g₁ = (1, 0), g₂ = (1, 1) it stalls at
    λ = (0.5, 1.5), where the main loss rises. Here the problem, a non-negative least squares problem in G, is
    solved exactly (λ = (1, 1), u = 0), and so is the hybrid form, which the article leaves to the reader.

    Primary tasks without gradient share all the primary weight, and λ = 0: u = 0 is the best there. Without
    a primary task in the batch all weights are 0.

    Attributes:
        primary: name of the main task, or names.
        auxiliary: names of the auxiliary tasks; None for all others.
    """

    needs = Needs.GRAM

    primary: str | Sequence[str]
    auxiliary: Sequence[str] | None = None

    def __post_init__(self) -> None:
        names = self._primary
        if not names:
            raise ValueError(f"PrimaryAuxiliary: primary must name at least one task, got {self.primary}")
        both = [*names, *(self.auxiliary or ())]
        if len(set(both)) < len(both):
            raise ValueError(f"PrimaryAuxiliary: a task is named twice in {both}")

    @property
    def _primary(self) -> tuple[str, ...]:
        return (self.primary,) if isinstance(self.primary, str) else tuple(self.primary)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Which tasks are primary."""
        named = {*self._primary, *(self.auxiliary or ())}
        if unknown := sorted(named - set(tasks)):
            raise ValueError(f"PrimaryAuxiliary: tasks must be of {list(tasks)}, got {unknown}")
        if self.auxiliary is not None and (rest := sorted(set(tasks) - named)):
            raise ValueError(f"PrimaryAuxiliary: {rest} must be named primary or auxiliary")
        is_primary = [float(task in self._primary) for task in tasks]
        return {"primary": constant(0.0, len(tasks), device).new_tensor(is_primary)}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """α for the primary tasks, λ for the auxiliary ones."""
        return on_present(_solve, stats, state["primary"]), state


def _solve(gram: Array, primary: Array) -> Array:
    if not primary.any():
        return np.zeros(len(gram))
    return min_norm_weights(gram, primary > 0)

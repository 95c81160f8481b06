"""PrimaryAuxiliary: primary tasks improve, and auxiliary losses do not rise."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

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

    g(α) and g(λ) are the weighted sums of the primary and of the auxiliary gradients. With one primary task,
    with gradient g₀, the problem is `u = argmax ⟨u, g₀⟩ - ½‖u‖²` subject to `⟨u, gᵢ⟩ >= 0` for all auxiliary
    tasks i. The solution `u = g₀ + Σ λᵢgᵢ` is the update nearest to g₀ that raises no auxiliary loss. With
    several primary tasks, each of them has `⟨u, gᵢ⟩ >= ‖u‖²`, as in MGDA. An auxiliary task without conflict
    has λ = 0, so its head is not trained in this step.

    Su, "On multi-task learning III", kexue.fm/archives/8907. The algorithm there updates one λ at a time and
    never reduces a λ. For g₀ = (-2, -1), g₁ = (1, 0), g₂ = (1, 1) it ends at λ = (0.5, 1.5), where the
    primary loss rises. Here this non-negative least squares problem in G is solved exactly (λ = (1, 1),
    u = 0). So is the problem with several primary tasks, which the article does not solve.

    If primary gradients are zero, these tasks share all the primary weight, and λ = 0, because u = 0 is
    optimal. If all primary tasks are absent, all weights are 0.

    Attributes:
        primary: name or names of the primary tasks.
        auxiliary: names of the auxiliary tasks; None is all other tasks.
    """

    name = "primary_auxiliary"
    paper = "Su, kexue.fm/archives/8907"
    cost = "QP, host"
    degrees = (0, 0)
    needs = Needs.GRAM

    primary: str | Sequence[str]
    auxiliary: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name, given in (("primary", self._primary), ("auxiliary", self.auxiliary or ())):
            if isinstance(given, (str, Mapping)) or not _are_names(given):
                raise ValueError(f"PrimaryAuxiliary: {name} must hold names of tasks, got {given!r}")
        names = self._primary
        if not names:
            raise ValueError(f"PrimaryAuxiliary: primary must name at least one task, got {self.primary}")
        both = [*names, *(self.auxiliary or ())]
        if len(set(both)) < len(both):
            raise ValueError(f"PrimaryAuxiliary: primary and auxiliary must list each task once, got {both}")

    @property
    def _primary(self) -> Sequence[str]:
        return (self.primary,) if isinstance(self.primary, str) else self.primary

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """The first name is that of the primary task."""
        return cls(min(tasks))

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Indicator of the primary tasks."""
        named = {*self._primary, *(self.auxiliary or ())}
        if unknown := sorted(named - set(tasks)):
            raise ValueError(f"PrimaryAuxiliary: tasks must be among {list(tasks)}, got {unknown}")
        if self.auxiliary is not None and (rest := sorted(set(tasks) - named)):
            raise ValueError(f"PrimaryAuxiliary: {rest} must be listed as primary or auxiliary")
        is_primary = [float(task in self._primary) for task in tasks]
        return {"primary": constant(0.0, len(tasks), device).new_tensor(is_primary)}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """α for the primary tasks, λ for the auxiliary tasks."""
        return on_present(_solve, stats, state["primary"]), state


def _solve(gram: Array, primary: Array) -> Array:
    if not primary.any():
        return np.zeros(len(gram))
    return min_norm_weights(gram, primary > 0)


def _are_names(given: object) -> bool:
    return isinstance(given, Collection) and all(isinstance(name, str) for name in given)

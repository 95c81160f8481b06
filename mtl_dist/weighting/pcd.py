"""PCD: follows one primary task, and guarantees every other task a share of its progress."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from mtl_dist.solvers import EPS, Array, project_on_progress
from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Needs, Rule, State
from mtl_dist.weighting.checks import check_fraction
from mtl_dist.weighting.helpers import constant, on_present


@dataclass(frozen=True)
class PCD(Rule):
    """`d̃ = argmin ‖d - g̃₁‖²` subject to `⟨g̃ⱼ, d⟩ >= τ‖g̃ⱼ‖²` for `j > 1`, rescaled to the norm of g₁.

    `g̃ᵢ = gᵢ/√v̂ᵢ`, where v̂ is the bias-corrected moving average of `‖gᵢ‖²`. The update is as close to the
    primary task 1 as possible, while every other task makes at least the fraction τ of the progress that its
    own normalised gradient would give.

    Priority-Constrained Descent, TMLR 2026, arXiv 2606.29521. The problem is solved exactly, as in TorchJD,
    without enumerating the sets of active constraints. TorchJD adds 1e-8 to v̂, which changes the rule for
    small gradients; this rule does not. If the constraints contradict each other, they are ignored and
    `u = g₁`. If g₁ is zero, or the primary task is absent, all weights are 0.

    Attributes:
        primary: name of the primary task; None is the first task.
        tau: τ in [0, 1].
        beta: decay of the moving average, in [0, 1).
    """

    name = "pcd"
    paper = "Priority-Constrained Descent, TMLR 2026"
    cost = "QP, host"
    degrees = (0, 0)
    needs = Needs.GRAM

    primary: str | None = None
    tau: float = 0.02
    beta: float = 0.999

    def __post_init__(self) -> None:
        check_fraction(self, "tau", self.tau)
        check_fraction(self, "beta", self.beta, one=False)

    @classmethod
    def example(cls, tasks: Sequence[str]) -> Self:
        """The first name is that of the primary task."""
        return cls(min(tasks))

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """Moving averages, their bias corrections, and an indicator of the primary task."""
        if self.primary is not None and self.primary not in tasks:
            raise ValueError(f"PCD: primary must be one of {list(tasks)}, got {self.primary!r}")
        first = self.primary if self.primary is not None else tasks[0]
        zeros = constant(0.0, len(tasks), device)
        primary = zeros.new_tensor([float(task == first) for task in tasks])
        return {"squares": zeros, "correction": zeros, "primary": primary}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights of d̃, and the new moving averages; those of absent tasks do not change."""
        squares = stats.require_gram().diagonal()
        # v ← βv + (1-β)‖g‖², c ← βc + (1-β), v̂ = v/c
        moved = self.beta * state["squares"] + (1 - self.beta) * squares
        correction = self.beta * state["correction"] + (1 - self.beta)
        after = {
            "squares": torch.where(stats.present, moved, state["squares"]),
            "correction": torch.where(stats.present, correction, state["correction"]),
            "primary": state["primary"],
        }
        return on_present(self._solve, stats, moved / correction, state["primary"]), after

    def _solve(self, gram: Array, square_average: Array, primary: Array) -> Array:
        if not (primary > 0).any() or primary @ gram @ primary <= 0:
            return np.zeros(len(gram))
        lengths = np.sqrt(np.where(square_average > 0, square_average, 1.0))
        unit = gram / np.outer(lengths, lengths)
        secondary = np.flatnonzero(primary == 0)
        others = unit[np.ix_(secondary, secondary)]
        # d̃ = g̃₁ + Σ μⱼg̃ⱼ, with the multipliers μ of the constraints
        mu = project_on_progress(others, self.tau * others.diagonal() - unit[secondary] @ primary)
        weights = primary.copy()
        weights[secondary] = 0.0 if mu is None else mu
        # rescaled to the norm of g₁, unless d̃ is zero up to rounding
        square = weights @ unit @ weights
        if square <= 32 * len(gram) * EPS * (weights @ np.sqrt(unit.diagonal())) ** 2:
            return np.zeros(len(gram))
        result: Array = weights / lengths * np.sqrt(primary @ gram @ primary / square)
        return result

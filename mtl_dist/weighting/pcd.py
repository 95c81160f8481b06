"""PCD: one primary task, and a guaranteed share of progress for each of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """`d̃ = argmin ‖d - g̃₁‖²` subject to `⟨g̃ⱼ, d⟩ >= τ‖g̃ⱼ‖²` for `j > 1`, rescaled to the length of g₁.

    `g̃ᵢ = gᵢ/√v̂ᵢ`, with v̂ the bias-corrected moving average of `‖gᵢ‖²`: task 1 is followed as closely as
    possible while each other task gets the fraction τ of the progress its own normalised gradient would give.

    Priority-Constrained Descent, TMLR 2026, arXiv 2606.29521. Solved exactly as in TorchJD, instead of
    enumerating the sets of active constraints; without the 1e-8 added to v̂ there, which changes the rule for
    small gradients. Where the constraints contradict each other they are dropped and `u = g₁`. Where g₁ is
    zero, or the primary task has no sample in the batch, all weights are 0.

    Attributes:
        primary: name of the primary task; None for the first.
        tau: τ in [0, 1].
        beta: decay of the moving average, in [0, 1).
    """

    needs = Needs.GRAM

    primary: str | None = None
    tau: float = 0.02
    beta: float = 0.999

    def __post_init__(self) -> None:
        check_fraction(self, "tau", self.tau)
        check_fraction(self, "beta", self.beta, one=False)

    def init(self, tasks: Sequence[str], device: torch.device) -> State:
        """The moving averages and their bias corrections, and which task is primary."""
        if self.primary is not None and self.primary not in tasks:
            raise ValueError(f"PCD: primary must be one of {list(tasks)}, got {self.primary!r}")
        first = self.primary if self.primary is not None else tasks[0]
        zeros = constant(0.0, len(tasks), device)
        primary = zeros.new_tensor([float(task == first) for task in tasks])
        return {"squares": zeros, "correction": zeros, "primary": primary}

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """Weights of d̃, and the moving averages; a task's average moves only where it is present."""
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
        # d̃ = g̃_1 + Σ μ_j g̃_j: the constraints as multiples of the others' gradients, shifted by g̃_1
        mu = project_on_progress(others, self.tau * others.diagonal() - unit[secondary] @ primary)
        weights = primary.copy()
        weights[secondary] = 0.0 if mu is None else mu
        # rescaled to the length of g_1, unless d̃ is zero up to rounding
        square = weights @ unit @ weights
        if square <= 32 * len(gram) * EPS * (weights @ np.sqrt(unit.diagonal())) ** 2:
            return np.zeros(len(gram))
        result: Array = weights / lengths * np.sqrt(primary @ gram @ primary / square)
        return result

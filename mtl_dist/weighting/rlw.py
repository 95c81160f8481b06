"""RLW: random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.helpers import softmax_present, step_generator


@dataclass(frozen=True)
class RLW(Rule):
    """Random loss weighting: `α = softmax(z)`, `z ~ N(0, I)`, drawn anew at every step.

    Lin et al., "Reasonable effectiveness of random weighting", TMLR 2022. The draw depends on `seed` and the
    step alone, so all ranks draw the same and a resumed run repeats it; LibMTL and TorchJD draw from the
    process's generator, so that each rank trains on other weights.

    Attributes:
        seed: of the draws.
    """

    seed: int = 0

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = softmax(z)` over the tasks present."""
        generator = step_generator(self.seed, stats.step)
        z = torch.randn(len(stats.losses), generator=generator, dtype=torch.float64).to(stats.losses)
        return softmax_present(z, stats.present), state

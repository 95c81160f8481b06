"""RLW: random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.stats import TaskStats
from mtl_dist.weighting.base import Rule, State
from mtl_dist.weighting.checks import check_count
from mtl_dist.weighting.helpers import softmax_present, step_generator


@dataclass(frozen=True)
class RLW(Rule):
    """Random loss weighting: `α = softmax(z)`, with a new `z ~ N(0, I)` in every step.

    Lin et al., "Reasonable effectiveness of random weighting", TMLR 2022. z depends only on `seed` and the
    step, so it is the same on all ranks and in a resumed run. LibMTL and TorchJD use the global generator of
    the process, so each rank trains with different weights.

    Attributes:
        seed: seed of the random numbers.
    """

    name = "rlw"
    paper = "Lin et al., TMLR 2022"
    cost = "O(n)"
    degrees = (0, 0)
    breaks = {
        "permutation": "draws go by position, not by task",
        "absent": "draws go by position, not by task",
    }

    seed: int = 0

    def __post_init__(self) -> None:
        check_count(self, "seed", self.seed, low=0)

    def update(self, stats: TaskStats, state: State) -> tuple[Tensor, State]:
        """`α = softmax(z)` over the tasks present."""
        generator = step_generator(self.seed, stats.step)
        z = torch.randn(len(stats.losses), generator=generator, dtype=torch.float64)
        z = z.to(stats.losses, non_blocking=True)
        return softmax_present(z, stats.present), state

"""Adam on a rule's own scalars, as a pure function: one weight a task, in the rule's state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.weighting.base import State
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Adam:
    """`θ ← θ - lr m̂ / (√v̂ + ε)`, as `torch.optim.Adam` does; a task that is left out keeps everything.

    Kingma and Ba, ICLR 2015. Each task has its own step count, so that a task seen for the first time at step
    1000 is corrected for its own bias. With `eps = 0` the step does not depend on the gradients' scale.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, num_tasks: int, device: torch.device) -> State:
        """First and second moments, and step counts."""
        return {key: constant(0.0, num_tasks, device) for key in ("m", "v", "t")}

    def step(self, theta: Tensor, gradient: Tensor, active: Tensor, state: State) -> tuple[Tensor, State]:
        """One step of the scalars of `active` tasks.

        Args:
            theta: `[n]`, the scalars.
            gradient: `[n]`, of what is minimised; finite where active.
            active: `[n]` bool.
            state: moments and counts.
        """
        g = torch.where(active, gradient + self.weight_decay * theta, 0.0)
        t = state["t"] + 1
        # m <- β₁m + (1-β₁)g, v <- β₂v + (1-β₂)g²
        m = self.beta1 * state["m"] + (1 - self.beta1) * g
        v = self.beta2 * state["v"] + (1 - self.beta2) * g * g
        # m̂ = m / (1-β₁ᵗ), v̂ = v / (1-β₂ᵗ)
        m_hat = m / (1 - self.beta1**t)
        scale = (v / (1 - self.beta2**t)).sqrt() + self.eps
        # θ <- θ - lr m̂ / (√v̂ + ε); with ε = 0 and no gradient so far, θ stays
        moved = theta - self.lr * torch.where(scale > 0, m_hat / scale, 0.0)
        new = {"m": m, "v": v, "t": t}
        kept = {key: torch.where(active, value, state[key]) for key, value in new.items()}
        return torch.where(active, moved, theta), kept

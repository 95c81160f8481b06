"""Adam for the scalars that a rule learns, as a pure function: one scalar per task, in the rule's state."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_dist.weighting.base import State
from mtl_dist.weighting.helpers import constant


@dataclass(frozen=True)
class Adam:
    """`θ ← θ - lr m̂ / (√v̂ + ε)`, as `torch.optim.Adam`, for the active tasks only.

    Kingma and Ba, ICLR 2015. Each task counts its own steps. So the bias correction is right also for a task
    that is first present at step 1000. With `eps = 0` the step does not depend on the gradient's scale.

    Attributes:
        lr: learning rate.
        beta1: β₁, decay of the first moment.
        beta2: β₂, decay of the second moment.
        eps: ε.
        weight_decay: γ of the L2 penalty; `γθ` is added to the gradient.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, num_tasks: int, device: torch.device) -> State:
        """First moments `m`, second moments `v` and step counts `t`."""
        return {key: constant(0.0, num_tasks, device) for key in ("m", "v", "t")}

    def step(self, theta: Tensor, gradient: Tensor, active: Tensor, state: State) -> tuple[Tensor, State]:
        """One step for the active tasks. The scalars and the state of the others do not change.

        Args:
            theta: `[n]`, the scalars θ.
            gradient: `[n]`, gradient of the objective with respect to θ; finite where active.
            active: `[n]` bool.
            state: result of `init` or of the previous `step`.

        Returns:
            The new θ, `[n]`, and the new state.
        """
        g = torch.where(active, gradient + self.weight_decay * theta, 0.0)
        t = state["t"] + 1
        # m ← β₁m + (1-β₁)g, v ← β₂v + (1-β₂)g²
        m = self.beta1 * state["m"] + (1 - self.beta1) * g
        v = self.beta2 * state["v"] + (1 - self.beta2) * g * g
        # m̂ = m / (1-β₁ᵗ), v̂ = v / (1-β₂ᵗ)
        m_hat = m / (1 - self.beta1**t)
        scale = (v / (1 - self.beta2**t)).sqrt() + self.eps
        # θ ← θ - lr m̂ / (√v̂ + ε); θ stays if ε = 0 and all gradients so far were 0
        moved = theta - self.lr * torch.where(scale > 0, m_hat / scale, 0.0)
        new = {"m": m, "v": v, "t": t}
        kept = {key: torch.where(active, value, state[key]) for key, value in new.items()}
        return torch.where(active, moved, theta), kept

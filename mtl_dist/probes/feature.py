"""FeatureProbe: the gradient of every task at the shared features, before the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mtl_dist.losses import Heads
from mtl_dist.probes.base import LaggedStep, Probe, StepContext
from mtl_dist.probes.lagged import lagged
from mtl_dist.probes.pipeline import evaluate, weigh
from mtl_dist.probes.settings import check_flag


@dataclass(frozen=True)
class FeatureProbe(Probe):
    """Measures `g_i = ∂l_i/∂z` inside the forward, by one pass back through the heads only.

    The weights are known before the backward and reach heads and trunk alike: the engine differentiates
    `Σ α_i s_i l_i`. Gradients are taken of the unscaled local losses, so loss scale and gradient
    accumulation do not enter. The Gram at z is that of the representation (the upper bound of Sener and
    Koltun, NeurIPS 2018), not that of the parameters: it does not contain the trunk's Jacobian.

    One function for all tasks takes one pass per task. So do heads that share what one of them computed from
    the features; the probe notices that.

    Attributes:
        reevaluate: evaluate the heads a second time for the backward, on the same random state, instead of
            keeping their graph. This is for engines that free parameters after their first use (ZeRO-3).
            Buffers of modules (batch statistics) are restored between the two evaluations, so they change
            once; other state that a head keeps in Python attributes changes twice. Losses that differ
            between the two evaluations are refused. None: where the engine needs it, found out at the first
            step.

    Raises:
        ValueError: a setting of the wrong kind; `reevaluate=False`, and the engine partitions parameters (on
            every rank, before any collective of the step); a head that changes the features in place, or
            reads them past its argument.
    """

    reevaluate: bool | None = None

    at_features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flag(self, "reevaluate", optional=True)

    def __call__(self, features: Any, heads: Heads, step: StepContext) -> Tensor:
        """`Σ α_i s_i l_i`, one collective."""
        batch = evaluate(features, heads, step, reevaluate=self.reevaluate)
        gram = None if batch.measured is None else batch.measured.gradients.gram()
        return weigh(batch, step.reduce(batch.losses.stats(gram)), step)

    def lagged(self, features: Any, heads: Heads, step: LaggedStep) -> Tensor:
        """The same with the weights from before this step.

        Where the gradients of the tasks arrive apart, they are measured in the one backward. One function for
        all tasks takes one pass per task, as always.
        """
        return lagged(features, heads, step) if heads.apart else self(features, heads, step)

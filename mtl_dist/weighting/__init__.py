"""The rules: pure functions of (global statistics, state). One rule a file, formula first.

`RULES` and `COMBINATORS` are the one list that tests, configuration, command line and documents read.
"""

from __future__ import annotations

from mtl_dist.weighting._base import Combinator, Needs, Rule, State
from mtl_dist.weighting.clamp import Clamp
from mtl_dist.weighting.equal import Equal
from mtl_dist.weighting.every import Every
from mtl_dist.weighting.fixed import Fixed
from mtl_dist.weighting.generalized_mean import GeneralizedMean
from mtl_dist.weighting.geometric_mean import GeometricMean
from mtl_dist.weighting.initial_loss import InitialLoss
from mtl_dist.weighting.inverse_grad_norm import InverseGradNorm
from mtl_dist.weighting.inverse_loss import InverseLoss
from mtl_dist.weighting.mgda import MGDA
from mtl_dist.weighting.normalize import Normalize
from mtl_dist.weighting.preference import Preference
from mtl_dist.weighting.prior_loss import PriorLoss
from mtl_dist.weighting.smooth import Smooth
from mtl_dist.weighting.warmup import Warmup

RULES: dict[str, type[Rule]] = {
    "equal": Equal,
    "fixed": Fixed,
    "generalized_mean": GeneralizedMean,
    "geometric_mean": GeometricMean,
    "initial_loss": InitialLoss,
    "inverse_grad_norm": InverseGradNorm,
    "inverse_loss": InverseLoss,
    "mgda": MGDA,
    "prior_loss": PriorLoss,
}

COMBINATORS: dict[str, type[Combinator]] = {
    "clamp": Clamp,
    "every": Every,
    "normalize": Normalize,
    "preference": Preference,
    "smooth": Smooth,
    "warmup": Warmup,
}

__all__ = [
    "COMBINATORS",
    "MGDA",
    "RULES",
    "Clamp",
    "Combinator",
    "Equal",
    "Every",
    "Fixed",
    "GeneralizedMean",
    "GeometricMean",
    "InitialLoss",
    "InverseGradNorm",
    "InverseLoss",
    "Needs",
    "Normalize",
    "Preference",
    "PriorLoss",
    "Rule",
    "Smooth",
    "State",
    "Warmup",
]

"""Initial and prior losses from label statistics: the loss of a task before the model has learned anything.

The initial loss is the loss of a model that knows nothing (zero logits, zero outputs). The prior loss is the
loss of the best constant prediction (the label marginal). Both need one streaming pass over the labels, and
nothing else. They are natural units for the loss of a task: https://kexue.fm/archives/8870.

    =========== ============ ====================
    loss        initial      prior
    =========== ============ ====================
    Categorical log K        entropy of the label frequencies
    Regression  E‖y‖²        E‖y - E y‖²
    Binary      log 2        entropy of the positive rate
    MultiLabel  log 2        mean of the labels' entropies
    =========== ============ ====================
"""

from __future__ import annotations

from mtl_dist.priors._base import LabelStatistics, synchronize
from mtl_dist.priors.binary import Binary, MultiLabel
from mtl_dist.priors.categorical import Categorical
from mtl_dist.priors.estimate import Priors, estimate_priors
from mtl_dist.priors.regression import Regression

__all__ = [
    "Binary",
    "Categorical",
    "LabelStatistics",
    "MultiLabel",
    "Priors",
    "Regression",
    "estimate_priors",
    "synchronize",
]

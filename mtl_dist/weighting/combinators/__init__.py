"""Combinators: rules that modify the weights, the statistics or the schedule of another rule."""

from __future__ import annotations

from mtl_dist.weighting.combinators.clamp import Clamp
from mtl_dist.weighting.combinators.every import Every
from mtl_dist.weighting.combinators.grouped import Grouped
from mtl_dist.weighting.combinators.keep_norm import KeepNorm
from mtl_dist.weighting.combinators.last_seen import LastSeen
from mtl_dist.weighting.combinators.normalize import Normalize
from mtl_dist.weighting.combinators.of_log_losses import OfLogLosses
from mtl_dist.weighting.combinators.preference import Preference
from mtl_dist.weighting.combinators.relative import Relative
from mtl_dist.weighting.combinators.smooth import Smooth
from mtl_dist.weighting.combinators.warmup import Warmup

__all__ = [
    "Clamp",
    "Every",
    "Grouped",
    "KeepNorm",
    "LastSeen",
    "Normalize",
    "OfLogLosses",
    "Preference",
    "Relative",
    "Smooth",
    "Warmup",
]

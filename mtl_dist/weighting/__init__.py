"""The rules: pure functions of (global statistics, state). One rule a file, formula first.

`RULES` and `COMBINATORS` are the one list that tests, configuration, command line and documents read.
"""

from __future__ import annotations

from mtl_dist.weighting._base import Combinator, Needs, Rule, State
from mtl_dist.weighting.equal import Equal
from mtl_dist.weighting.geometric_mean import GeometricMean
from mtl_dist.weighting.mgda import MGDA
from mtl_dist.weighting.smooth import Smooth

RULES: dict[str, type[Rule]] = {
    "equal": Equal,
    "geometric_mean": GeometricMean,
    "mgda": MGDA,
}

COMBINATORS: dict[str, type[Combinator]] = {
    "smooth": Smooth,
}

__all__ = [
    "COMBINATORS",
    "MGDA",
    "RULES",
    "Combinator",
    "Equal",
    "GeometricMean",
    "Needs",
    "Rule",
    "Smooth",
    "State",
]

"""Synchronised multi-task loss weighting for any data-parallel engine.

`Balancer` turns task losses into one scalar with weights that all ranks agree on; rules are in
`mtl_dist.weighting`, probes in `mtl_dist.probes`.
"""

from __future__ import annotations

from mtl_dist.balancer import Balancer, EvaluationSums, OnNonfinite, collect_evaluation
from mtl_dist.checks import Finding
from mtl_dist.engines import Engine
from mtl_dist.probes import FeatureProbe, FeatureTap, ParameterProbe, SharedLayerProbe
from mtl_dist.stats import Elapsed, StepReport, TaskStats
from mtl_dist.weighting import COMBINATORS, RULES, Needs, Rule

__version__ = "0.1.0"

__all__ = [
    "COMBINATORS",
    "RULES",
    "Balancer",
    "Elapsed",
    "Engine",
    "EvaluationSums",
    "FeatureProbe",
    "FeatureTap",
    "Finding",
    "Needs",
    "OnNonfinite",
    "ParameterProbe",
    "Rule",
    "SharedLayerProbe",
    "StepReport",
    "TaskStats",
    "collect_evaluation",
]

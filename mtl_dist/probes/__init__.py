"""How gradient statistics are measured, and how the weights enter the graph again."""

from __future__ import annotations

from mtl_dist.probes.base import Probe, ProbeMemory, Reduced, StepContext
from mtl_dist.probes.feature import FeatureProbe
from mtl_dist.probes.guards import in_words, tell_detached, without_graph
from mtl_dist.probes.parameter import ParameterProbe
from mtl_dist.probes.shared_layer import SharedLayerProbe
from mtl_dist.probes.tap import FeatureTap

__all__ = [
    "FeatureProbe",
    "FeatureTap",
    "ParameterProbe",
    "Probe",
    "ProbeMemory",
    "Reduced",
    "SharedLayerProbe",
    "StepContext",
    "in_words",
    "tell_detached",
    "without_graph",
]

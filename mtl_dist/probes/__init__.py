"""How gradient statistics are measured, and how weights re-enter the graph."""

from __future__ import annotations

from mtl_dist.probes._base import Exchange, Probe, Reduced
from mtl_dist.probes._losses import Counts, Head, Heads, Losses, TaskLosses
from mtl_dist.probes.feature_probe import FeatureProbe
from mtl_dist.probes.feature_tap import FeatureTap
from mtl_dist.probes.parameter_probe import ParameterProbe
from mtl_dist.probes.shared_layer_probe import SharedLayerProbe

__all__ = [
    "Counts",
    "Exchange",
    "FeatureProbe",
    "FeatureTap",
    "Head",
    "Heads",
    "Losses",
    "ParameterProbe",
    "Probe",
    "Reduced",
    "SharedLayerProbe",
    "TaskLosses",
]

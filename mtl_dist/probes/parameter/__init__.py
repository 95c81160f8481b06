"""ParameterProbe, and the way of n gradients through the graph of the trunk."""

from __future__ import annotations

from mtl_dist.probes.parameter.probe import ParameterProbe

__all__ = ["ParameterProbe"]
